"""Settings of a deployment: what is served, by how many engines, to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.shared.sections import EngineSection, Section
from pipelines.tracking.registry import is_registered
from serve.media.config import MediaConfig
from skipvision import SkipConfig

Proxy = Literal["ray", "haproxy"]


class ServingEngineSection(EngineSection):
    """Of each engine; people ask about an image more than once."""

    prefix_cache_bytes: int = Field(
        2**28, ge=0, description="bytes for images that may be asked about again, to read them once; 0 = none"
    )


class ScalingSection(Section):
    """How many engines there are, and when there are more."""

    min_engines: int = Field(
        1, ge=0, description="engines that run without requests (count); 0 = start on demand"
    )
    max_engines: int = Field(1, ge=1, description="engines that run at most (count)")
    target_load: float = Field(
        1.0,
        gt=0,
        description="load of each engine aimed at: 1 = as many requests as it has rows or memory for",
    )
    upscale_delay_s: float = Field(
        5.0, ge=0, description="load must last this long before engines are added (s)"
    )
    downscale_delay_s: float = Field(60.0, ge=0, description="before engines are taken away (s)")
    interval_s: float = Field(1.0, gt=0, description="time between measurements (s)")
    cpus_per_engine: float = Field(1.0, gt=0, description="CPUs of each engine (count)")
    gpus_per_engine: float = Field(0.0, ge=0, description="GPUs of each engine (count or fraction)")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_engines < self.min_engines:
            raise ValueError(f"max_engines={self.max_engines} is less than min_engines={self.min_engines}")
        return self


class ModelSection(Section):
    """One base model with its adapters."""

    path: str = Field(description="folder, or Hugging Face id, of the base model")
    name: str | None = Field(None, description="what clients call it; by default the last part of the path")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="adapters by the name that clients use: folders, or models:/name@alias in MLflow",
    )
    skip: SkipConfig | None = Field(
        None,
        description="SkipConfig of the base model; none given = all tokens. Adapters have their own",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of weights and arithmetic")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="implementation")
    engine: ServingEngineSection = Field(default_factory=ServingEngineSection, description="of each engine")
    scaling: ScalingSection = Field(default_factory=ScalingSection, description="how many engines")

    @property
    def served_name(self) -> str:
        """What clients call the base model."""
        return self.name or Path(self.path).name


class LimitSection(Section):
    """What one deployment takes on."""

    queued_requests: int = Field(
        64,
        ge=1,
        description="requests that wait at each engine for its rows, and again at each ingress for an engine "
        "with room, before others get 429 (count)",
    )
    open_requests: int = Field(
        256,
        ge=1,
        description="requests at each ingress, from upload to answer, before others get 429 (count)",
    )
    request_seconds: float = Field(
        120.0, gt=0, description="time for an answer, from arrival; what is there then is the end (s)"
    )
    max_new_tokens: int = Field(1024, ge=1, description="most tokens of an answer (tokens)")
    images: int = Field(16, ge=0, description="most images of a request (count)")
    pixels: int = Field(
        50_000_000, ge=1, description="most pixels of all images of a request together (pixels)"
    )
    prepare_threads: int = Field(
        2,
        ge=1,
        description="requests whose images are decoded and scaled at once in each ingress; each may take "
        "the memory of its pixels several times over (threads)",
    )
    body_mib: float = Field(32.0, gt=0, description="largest body of a request (MiB)")
    retry_after_s: int = Field(1, ge=1, description="Retry-After of a 429 (s)")


class ServeConfig(Section):
    """A deployment. ``model`` and ``adapter`` name one model; ``models`` several, or one with settings."""

    name: str = Field("skipvision", description="of the application on the cluster")
    host: str = Field("127.0.0.1", description="address that is listened on; 0.0.0.0 = all (jobs/deploy.py)")
    port: int = Field(8000, ge=1, le=65535, description="port that is listened on (jobs/deploy.py)")
    proxy: Proxy = Field(
        "ray",
        description="what listens there: Ray's own, which makes good what a dying ingress leaves behind, or "
        "HAProxy, which comes with Ray and takes less time (jobs/deploy.py)",
    )
    model: str | None = Field(None, description="folder or Hugging Face id of the one model that is served")
    adapter: str | None = Field(
        None, description="its adapter: folder, or models:/name@alias; served as 'adapter'"
    )
    models: list[ModelSection] = Field(default_factory=list, description="models with their settings")
    media: MediaConfig = Field(default_factory=MediaConfig, description="images by URL")
    limits: LimitSection = Field(default_factory=LimitSection, description="what the deployment takes on")
    keys_file: str | None = Field(None, description="API keys (serve.keys); none = everyone may ask")
    cors_origins: list[str] = Field(
        default_factory=list, description="web origins that may ask; none by default"
    )
    ingresses: int = Field(1, ge=1, description="HTTP replicas (count)")
    adapter_poll_s: float = Field(
        30.0, gt=0, description="time between looks whether an MLflow alias has moved (s)"
    )
    tracking_uri: str | None = Field(None, description="MLflow's URI for models:/ adapters")
    traces: str | None = Field(
        None,
        description="collector of OpenTelemetry's traces, http://collector:4318/v1/traces; none = no traces",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, data: Any) -> Any:
        """``model`` and ``adapter`` are a short way to write the first of ``models``."""
        if not isinstance(data, dict) or data.get("model") is None:
            return data
        models = data.get("models") or []
        if not isinstance(models, list):
            return data
        adapter = data.get("adapter")
        first = {"path": data["model"], "adapters": {} if adapter is None else {"adapter": adapter}}
        return {**data, "models": [first, *models], "model": None, "adapter": None}

    @model_validator(mode="after")
    def _something_to_serve(self) -> Self:
        if self.adapter is not None:
            raise ValueError("adapter without model: name the base model, too")
        if not self.models:
            raise ValueError("nothing to serve: give model=FOLDER, or models")
        names = [name for model in self.models for name in (model.served_name, *model.adapters)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names used twice: {', '.join(twice)}; clients choose by name")
        sources = [source for model in self.models for source in model.adapters.values()]
        registered = [source for source in sources if is_registered(source)]
        if registered and self.tracking_uri is None:
            raise ValueError(f"{', '.join(registered)} without tracking_uri: say which MLflow has it")
        return self

    def served(self) -> dict[str, tuple[int, str | None]]:
        """For each name that clients use: number of the model, and adapter or None for the base model."""
        found: dict[str, tuple[int, str | None]] = {}
        for number, model in enumerate(self.models):
            found[model.served_name] = number, None
            found |= {adapter: (number, adapter) for adapter in model.adapters}
        return found


def serve_config(arguments: dict[str, Any]) -> ServeConfig:
    """The settings of `serve run serve.app:build …`; flat keys with dots are sections."""
    tree: dict[str, Any] = {}
    for name, value in arguments.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return ServeConfig.model_validate(tree)
