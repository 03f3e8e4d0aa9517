"""The model of an engine: found and pinned before a job starts, loaded where the engine runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

import skipvision as sv
from pipelines.engines.config import BaseModelSection, ModelSection
from pipelines.engines.loading import (
    arithmetic,
    check_known,
    empty_model,
    load_base,
    load_config,
    load_processor,
)
from pipelines.shared.paths import input_path
from pipelines.shared.sections import EngineSection
from pipelines.tracking.registry import exact_model, fetch_model, is_registered
from skipvision.adapters.fitting import load_without_weights
from skipvision.engine import Engine
from skipvision.engine.generation import check_generation_config
from skipvision.errors import ConfigError
from skipvision.exporting.load import attach_as_exported
from skipvision.exporting.read import exported_settings, settings_of


@dataclass(frozen=True)
class EngineModel:
    """A base model with an optional adapter, and the SkipConfig it runs under.

    Attributes:
        base: folder or Hugging Face id of the base model.
        label: the base model as the settings name it.
        adapter: folder of the adapter; None = the base model alone.
        adapter_label: the adapter in results: its registered version, or its folder with a digest.
        skip: default SkipConfig of the engine's requests.
        dtype: dtype of weights and arithmetic; "auto" = bfloat16 where the hardware multiplies it natively.
        attention: attention implementation.
    """

    base: str
    label: str
    adapter: Path | None
    adapter_label: str | None
    skip: sv.SkipConfig
    dtype: str
    attention: str

    @classmethod
    def of(cls, base: BaseModelSection, adapter: Path | None, skip: sv.SkipConfig) -> EngineModel:
        """Return the model of a section whose path is resolved, with an adapter of this machine."""
        return cls(base.path, base.path, adapter, None, skip, base.dtype, base.attention)


class ModelSettings(Protocol):
    """The settings of a job that choose its model."""

    @property
    def model(self) -> ModelSection: ...
    @property
    def skip(self) -> sv.SkipConfig | Literal["full"] | None: ...


def find_model(config: ModelSettings, registry: str, downloads: Path, pinned: str | None) -> EngineModel:
    """Find the model that the settings name, and download its adapter if it is registered in MLflow.

    Args:
        config: settings of the job.
        registry: URI of MLflow.
        downloads: folder for a registered adapter.
        pinned: label of the adapter when the job began; its alias may have moved since. None = a new job.

    Raises:
        ConfigError: the model or adapter does not exist, or the adapter has changed since the job began.
        AdapterError: the folder holds no adapter.
        TrackingError: MLflow does not have the adapter.
    """
    given = config.model
    base = given.path
    with suppress(ConfigError):  # it may be a Hugging Face id; loading reports what does not exist
        base = input_path(given.path, "model.path")
    folder: Path | None = None
    label: str | None = None
    if given.adapter is not None and is_registered(given.adapter):
        label = fetch_model(registry, pinned or given.adapter, downloads)
        folder = downloads
    elif given.adapter is not None:
        folder = Path(input_path(given.adapter, "model.adapter"))
        try:
            label = f"{given.adapter}@{adapter_digest(folder)}"
        except OSError as error:
            raise ConfigError(
                f"model.adapter = {given.adapter}: {error.filename} cannot be read: {error.strerror}; give "
                "the folder of an adapter that this user may read"
            ) from None
    _check_unchanged(given, label, pinned)
    skip: Any = config.skip
    if skip is None:
        skip = _exported_skip(base) if folder is None else sv.read_adapter(folder)["skip"]
    return EngineModel(
        base=base,
        label=given.path,
        adapter=folder,
        adapter_label=label,
        skip=skip if isinstance(skip, sv.SkipConfig) else sv.SkipConfig.full(),
        dtype=given.dtype,
        attention=given.attention,
    )


def _exported_skip(base: str) -> sv.SkipConfig | None:
    """Return the SkipConfig that an exported model names; None for other models."""
    try:
        if not Path(base).is_dir():
            check_known(base, "model.path")  # one request to the hub, where transformers would send several
        exported = settings_of(base)
    except ConfigError:
        return None  # `check_model` reports why the model cannot be used
    return None if exported is None else exported.skip


def insist_on_same_adapter(given: ModelSection, registry: str, pinned: str | None) -> None:
    """Raise `ConfigError` if the adapter of a finished job is an alias that has moved to another version."""
    if given.adapter is not None and is_registered(given.adapter):
        _check_unchanged(given, exact_model(registry, given.adapter), pinned)


def _check_unchanged(given: ModelSection, now: str | None, pinned: str | None) -> None:
    if pinned is not None and now != pinned:
        raise ConfigError(
            f"model.adapter = {given.adapter} has changed since this job began ({pinned} then, {now} now): "
            "restore it, or choose another name for the job"
        )


def check_model(model: EngineModel) -> PretrainedConfig:
    """Check all but the base model's weights, so that errors appear before any engine starts.

    Returns:
        The config of the base model.

    Raises:
        ConfigError: the base model does not exist, has no chat template, or does not support the settings.
        AdapterError: the adapter's files are damaged or belong to another model.
    """
    check_known(model.base, "model.path")
    config = load_config(model.base)
    base = empty_model(config)
    exported = None if model.adapter is not None else exported_settings(config)
    if exported is not None and exported.skip is not None:
        with sv.attach(base, exported.skip) as attachment:
            attachment.check(model.skip)
    with sv.attach(base, model.skip):
        pass
    if model.adapter is not None:
        load_without_weights(base, model.adapter)
    processor: Any = load_processor(model.base)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"model.path = {model.label}: {type(processor).__name__} has no chat template: "
            "choose a model with one"
        )
    return config


def check_generation(base: str) -> None:
    """Raise `ConfigError` if a model's generation_config has settings that the library's engine refuses."""
    with suppress(OSError):  # it has none
        check_generation_config(GenerationConfig.from_pretrained(base))


def load_engine(
    model: EngineModel,
    settings: EngineSection,
    device: torch.device,
    adjust: Callable[[nn.Module], object] | None = None,
) -> Engine:
    """Load base model, adapter and processor, and return their engine. It ends with `Engine.close`.

    ``adjust`` gets the loaded model before the engine does.
    """
    tuned = load_tuned(model, device)
    if adjust is not None:
        adjust(tuned)
    processor = load_processor(model.base)
    arguments = settings.model_dump(include=set(EngineSection.model_fields))
    return Engine(tuned, processor, model.skip, **arguments)


def load_tuned(model: EngineModel, device: torch.device) -> nn.Module:
    """Load base model and adapter, or an exported model with what it was exported with."""
    transformers.utils.logging.disable_progress_bar()
    dtype = arithmetic(model.dtype, device)
    base = load_base(model.base, dtype, model.attention, device)
    if model.adapter is None:
        attach_as_exported(base, model.base)
        return base.to(device, dtype)
    tuned: nn.Module = sv.load_adapter(base, model.adapter).to(device, dtype)
    return tuned


def adapter_digest(folder: Path) -> str:
    """Return eight hexadecimal digits that identify the contents of an adapter's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
