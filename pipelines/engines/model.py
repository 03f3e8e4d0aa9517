"""The model that captions: found and pinned before a job starts, loaded where an engine runs."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

import skipvision as sv
from pipelines.engines.config import ModelSection
from pipelines.engines.loading import arithmetic, load_base, load_processor
from pipelines.shared.paths import input_path
from pipelines.shared.sections import EngineSection
from pipelines.tracking.registry import exact_model, fetch_model, is_registered
from skipvision.engine import Engine
from skipvision.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class EngineModel:
    """A base model, perhaps an adapter, and how visual tokens are skipped.

    Attributes:
        base: folder or Hugging Face id.
        label: how the settings name it.
        adapter: folder; None = the base model as it is.
        adapter_label: how the result names the adapter: with its version or a digest of its files.
        skip: of all captions.
        dtype: of weights and arithmetic; auto = what the hardware likes.
        attention: implementation.
    """

    base: str
    label: str
    adapter: Path | None
    adapter_label: str | None
    skip: sv.SkipConfig
    dtype: str
    attention: str


class Asked(Protocol):
    """The part of a job's settings that says which model it is about."""

    @property
    def model(self) -> ModelSection: ...
    @property
    def skip(self) -> sv.SkipConfig | Literal["full"] | None: ...


def find_model(config: Asked, registry: str, downloads: Path, pinned: str | None) -> EngineModel:
    """The model that the settings name, with its adapter on this machine.

    Args:
        config: settings.
        registry: MLflow's URI.
        downloads: folder for an adapter from there.
        pinned: what the adapter was when the job began; an alias may have moved since.

    Raises:
        ConfigError: there is no such model or adapter, or the adapter has changed since.
        AdapterError: the folder holds no adapter.
        TrackingError: MLflow does not have it.
    """
    given = config.model
    base = given.path
    with suppress(ConfigError):  # then it is a Hugging Face id, or loading it says that it is nothing
        base = input_path(given.path, "model.path")
    folder: Path | None = None
    label: str | None = None
    if given.adapter is not None and is_registered(given.adapter):
        label = fetch_model(registry, pinned or given.adapter, downloads)
        folder = downloads
    elif given.adapter is not None:
        folder = Path(input_path(given.adapter, "model.adapter"))
        label = f"{given.adapter}@{adapter_digest(folder)}"
    _insist_on_same(given, label, pinned)
    skip: Any = config.skip
    if skip is None and folder is not None:
        skip = sv.read_adapter(folder)["skip"]
    return EngineModel(
        base=base,
        label=given.path,
        adapter=folder,
        adapter_label=label,
        skip=skip if isinstance(skip, sv.SkipConfig) else sv.SkipConfig.full(),
        dtype=given.dtype,
        attention=given.attention,
    )


def insist_on_same_adapter(given: ModelSection, registry: str, pinned: str | None) -> None:
    """For a job that is finished: raise `ConfigError` if its adapter's alias means another version now."""
    if given.adapter is not None and is_registered(given.adapter):
        _insist_on_same(given, exact_model(registry, given.adapter), pinned)


def _insist_on_same(given: ModelSection, now: str | None, pinned: str | None) -> None:
    if pinned is not None and now != pinned:
        raise ConfigError(
            f"model.adapter = {given.adapter} has changed since this job began ({pinned} then, {now} now): "
            "restore it, or choose another name"
        )


def check_model(model: EngineModel) -> PretrainedConfig:
    """Try everything but the base model's weights, so that a mistake is an error now and not every engine's.

    Raises:
        ConfigError: there is no such base model, or it cannot be asked or run so.
        AdapterError: the adapter's files are damaged, or made for another model.
    """
    try:
        config = AutoConfig.from_pretrained(model.base)
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {model.label}: {error}") from error
    with sv.attach(base, model.skip):
        pass
    if model.adapter is not None:
        _check_adapter(base, model.adapter)
    processor: Any = load_processor(model.base)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"model.path = {model.label}: {type(processor).__name__} has no chat template for prompts"
        )
    return config


def _check_adapter(base: nn.Module, folder: Path) -> None:
    """Put an adapter on a model that has no weights."""
    incomplete = "Found missing adapter keys"
    with warnings.catch_warnings():
        # Of its weights, which there is nothing to be copied into.
        warnings.filterwarnings("ignore", ".*non-meta parameter in the checkpoint to a meta", UserWarning)
        warnings.filterwarnings("error", incomplete, UserWarning)
        try:
            sv.load_adapter(base, folder)
        except UserWarning as warning:
            if not str(warning).startswith(incomplete):
                raise
            raise AdapterError(f"{folder} is an incomplete adapter: {warning}") from None


def load_engine(model: EngineModel, settings: EngineSection, device: torch.device) -> Engine:
    """The engine, with everything loaded."""
    transformers.utils.logging.disable_progress_bar()
    dtype = arithmetic(model.dtype, device)
    base = load_base(model.base, dtype, model.attention, device)
    whole = base if model.adapter is None else sv.load_adapter(base, model.adapter).to(device, dtype)
    processor = load_processor(model.base)
    return Engine(whole, processor, model.skip, **settings.model_dump())


def adapter_digest(folder: Path) -> str:
    """Eight hexadecimal digits of an adapter's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
