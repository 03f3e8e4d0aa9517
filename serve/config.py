"""Settings of a deployment: its models, the number of engines, limits and access."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from pipelines.engines.config import BackendSection
from pipelines.shared.sections import Section
from pipelines.tracking.registry import is_registered
from serve.media.config import MediaConfig
from skipvision import SkipConfig
from skipvision.errors import ConfigError
from skipvision.problems import problem_lines

Proxy = Literal["ray", "haproxy"]

_NAME = re.compile(r"[^\W_][\w.:@+-]*(/[^\W_][\w.:@+-]*)*")
_MAX_NAME = 128
_NAME_RULE = (
    "give a name of letters, digits and any of - _ . : @ +, with single slashes between parts that begin "
    f"with a letter or digit, of at most {_MAX_NAME} characters"
)
"""Rule for the names of models and adapters: clients send them, also in paths, and the page shows them."""


class ServingEngineSection(BackendSection):
    """Settings of each engine. An endpoint caches images, because users send several questions about one."""

    prefix_cache_bytes: int = Field(
        2**28, ge=0, description="cache for images of earlier requests, so that each is encoded once (bytes)"
    )


class ScalingSection(Section):
    """How many engines run, and what each reserves."""

    min_engines: int = Field(1, ge=0, description="engines that run without requests; 0 = start on demand")
    max_engines: int = Field(1, ge=1, description="max engines")
    target_load: float = Field(
        1.0,
        gt=0,
        description="target load of each engine: 1 = as many requests as it has rows or memory for",
    )
    upscale_delay_s: float = Field(
        5.0, ge=0, description="how long load must stay high before engines are added (s)"
    )
    downscale_delay_s: float = Field(
        60.0, ge=0, description="how long load must stay low before engines are removed (s)"
    )
    interval_s: float = Field(1.0, gt=0, description="time between load measurements (s)")
    cpus_per_engine: float = Field(
        0.75, gt=0, description="CPUs of each engine; each ingress takes another 0.25"
    )
    gpus_per_engine: float = Field(0.0, ge=0, description="GPUs of each engine; fractions share one")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_engines < self.min_engines:
            raise ValueError(f"max_engines={self.max_engines} is less than min_engines={self.min_engines}")
        return self


class ModelSection(Section):
    """One base model with its adapters."""

    path: str = Field(description="folder, or Hugging Face id, of the base model")
    name: str | None = Field(None, description="name for clients; default: the last part of the path")
    adapters: dict[str, str] = Field(
        default_factory=dict,
        description="adapters by their name for clients: folders, or models:/name@alias in MLflow",
    )
    skip: SkipConfig | None = Field(
        None,
        description="SkipConfig of the base model; default: as it was exported, otherwise all tokens. "
        "Adapters bring their own",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of weights and arithmetic"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation"
    )
    engine: ServingEngineSection = Field(
        default_factory=ServingEngineSection, description="settings of each engine"
    )
    scaling: ScalingSection = Field(default_factory=ScalingSection, description="number of engines")

    @property
    def served_name(self) -> str:
        """Name of the base model for clients; by default the folder's, with - for what names may not have."""
        folder = Path(self.path)
        plain = re.sub(r"[^\w.:@+-]+", "-", folder.name or folder.resolve().name).strip("-._:@+")
        return self.name or plain[:_MAX_NAME] or "model"

    @model_validator(mode="after")
    def _names_for_clients(self) -> Self:
        for name in (*([] if self.name is None else [self.name]), *self.adapters):
            if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name[: 2 * _MAX_NAME]!r} cannot be a model's or adapter's name: {_NAME_RULE}"
                )
        return self


class LimitSection(Section):
    """Limits on requests and on their number."""

    queued_requests: int = Field(
        64,
        ge=1,
        description="requests that wait at each engine for a free row, and again at each ingress for an "
        "engine with room, before others get 429",
    )
    open_requests: int = Field(
        256,
        ge=1,
        description="requests at each ingress, from upload to answer, before others get 429",
    )
    request_seconds: float = Field(
        120.0,
        gt=0,
        description="time from a request's arrival until its answer is cut off (s)",
    )
    max_new_tokens: int = Field(1024, ge=1, description="max tokens of an answer")
    images: int = Field(16, ge=0, description="max images of a request")
    pixels: int = Field(50_000_000, ge=1, description="max pixels of all images of a request together")
    prepare_threads: int = Field(
        2,
        ge=1,
        description="requests whose images each ingress decodes and resizes at once; each may take "
        "several times the memory of its pixels",
    )
    template_seconds: float = Field(
        5.0,
        gt=0,
        description="time for the chat template of a model to make the text of one prompt; one that takes "
        "longer is stopped, and the request refused (s)",
    )
    body_mib: float = Field(32.0, gt=0, description="max size of a request's body (MiB)")
    retry_after_s: int = Field(1, ge=1, description="Retry-After of a 429 (s)")


class ServeConfig(Section):
    """A deployment. ``model`` and ``adapter`` name one model; ``models`` several, or one with settings."""

    name: str = Field("skipvision", description="name of the application on the cluster")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = all (jobs/deploy.py)")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on (jobs/deploy.py)")
    proxy: Proxy = Field(
        "ray",
        description="HTTP proxy: Ray's own, which retries requests of an ingress that dies, or HAProxy, "
        "which comes with Ray and is faster (jobs/deploy.py)",
    )
    model: str | None = Field(None, description="folder or Hugging Face id of a single model")
    adapter: str | None = Field(
        None, description="its adapter: folder, or models:/name@alias; its name for clients is 'adapter'"
    )
    engine: ServingEngineSection | None = Field(None, description="settings of the engines of that model")
    models: list[ModelSection] = Field(default_factory=list, description="models with their settings")
    media: MediaConfig = Field(default_factory=MediaConfig, description="images by URL")
    limits: LimitSection = Field(default_factory=LimitSection, description="limits on requests")
    keys_file: str | None = Field(None, description="API keys (serve.keys); none = open to everyone")
    cors_origins: list[str] = Field(
        default_factory=list, description="web origins that browsers may send requests from; none by default"
    )
    ingresses: int = Field(1, ge=1, description="HTTP replicas")
    adapter_poll_s: float = Field(
        30.0, gt=0, description="time between checks whether an MLflow alias has moved (s)"
    )
    tracking_uri: str | None = Field(None, description="MLflow's URI for models:/ adapters")
    traces: str | None = Field(
        None,
        description="OpenTelemetry collector of traces, http://collector:4318/v1/traces; none = no traces",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, data: Any) -> Any:
        """Turn ``model``, ``adapter`` and ``engine`` into the first of ``models``."""
        if not isinstance(data, dict) or data.get("model") is None:
            return data
        models = data.get("models") or []
        if not isinstance(models, list):
            return data
        adapter, engine = data.get("adapter"), data.get("engine")
        first = {"path": data["model"], "adapters": {} if adapter is None else {"adapter": adapter}}
        if engine is not None:
            first["engine"] = engine
        return {**data, "models": [first, *models], "model": None, "adapter": None, "engine": None}

    @model_validator(mode="after")
    def _something_to_serve(self) -> Self:
        if self.adapter is not None:
            raise ValueError("adapter without model: name its base model too")
        if self.engine is not None:
            raise ValueError("engine without model: each of models has an engine section of its own")
        if not self.models:
            raise ValueError("nothing to serve: give model=FOLDER, or models")
        names = [name for model in self.models for name in (model.served_name, *model.adapters)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names used twice: {', '.join(twice)}; clients choose a model by its name")
        sources = [source for model in self.models for source in model.adapters.values()]
        registered = [source for source in sources if is_registered(source)]
        if registered and self.tracking_uri is None:
            raise ValueError(f"{', '.join(registered)} without tracking_uri: name the MLflow to load it from")
        return self

    def served(self) -> dict[str, tuple[int, str | None]]:
        """Map each name for clients to the index of its model, and to an adapter or None."""
        targets: dict[str, tuple[int, str | None]] = {}
        for number, model in enumerate(self.models):
            targets[model.served_name] = number, None
            targets |= {adapter: (number, adapter) for adapter in model.adapters}
        return targets


def serve_config(arguments: dict[str, Any]) -> ServeConfig:
    """Read the settings of ``serve run serve.app:build``, whose dotted keys name fields of sections.

    Raises:
        ConfigError: one line for each invalid setting.
    """
    tree: dict[str, Any] = {}
    for name, value in arguments.items():
        *path, last = name.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        # Other fields have types, by which pydantic reads the words of a command line.
        words = "engine_kwargs" in path and isinstance(value, str)
        section[last] = yaml.safe_load(value) if words else value
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(problem_lines(error, ServeConfig, tree))) from error
