"""Read what an exported folder says about Skip-Vision: the SkipConfig and the summary layer.

config.json                    the model's config with the key "skip_vision"
skip_vision/summary.safetensors    the summary layer, if the SkipConfig has summary tokens

The summary layer has a folder of its own, because vLLM reads every safetensors file next to ``config.json``
as weights of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from skipvision.adapters.files import read_summary
from skipvision.config import SkipConfig
from skipvision.errors import AdapterError, ConfigError
from skipvision.loading import find_file, load_config
from skipvision.summary import SummaryLayer

EXPORTED = "skip_vision"
"""The key in ``config.json``, and the subfolder for files of Skip-Vision."""
SUMMARY_FILE = f"{EXPORTED}/summary.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Exported:
    """The settings of Skip-Vision in the config of an exported model.

    Attributes:
        skip: the SkipConfig that the model was tuned with; None = full tokens.
        hidden_size: width of the decoder.
        layers: layers of the decoder.
    """

    skip: SkipConfig | None
    hidden_size: int
    layers: int

    @property
    def summary_file(self) -> str | None:
        """The file of the summary layer, relative to the folder; None without summary tokens."""
        return SUMMARY_FILE if self.skip is not None and self.skip.summary_tokens else None

    def as_json(self) -> dict[str, Any]:
        """Return the value of the key "skip_vision" in ``config.json``."""
        return {
            "format": FORMAT,
            "skip": None if self.skip is None else self.skip.model_dump(),
            "summary": self.summary_file,
            "hidden_size": self.hidden_size,
            "layers": self.layers,
        }


def exported_settings(config: PretrainedConfig | Mapping[str, Any]) -> Exported | None:
    """Return what a model's config says about Skip-Vision; None if the model was not exported.

    Args:
        config: as transformers or vLLM load it, or the content of ``config.json``.

    Raises:
        AdapterError: the entry is damaged, or was written by a newer version.
    """
    entry = config.get(EXPORTED) if isinstance(config, Mapping) else getattr(config, EXPORTED, None)
    if entry is None:
        return None
    try:
        if entry["format"] != FORMAT:
            raise AdapterError(
                f"config.json: {EXPORTED!r} has format {entry['format']!r}; this version reads {FORMAT}"
            )
        skip, sizes = entry["skip"], (entry["hidden_size"], entry["layers"])
        exported = Exported(None if skip is None else SkipConfig(**skip), *map(int, sizes))
        named = entry["summary"]
    except AdapterError:
        raise
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"config.json: {EXPORTED!r} cannot be read ({type(error).__name__}: {error}): "
            "export the model again"
        ) from error
    if named != exported.summary_file:
        raise AdapterError(
            f"config.json: {EXPORTED!r} names the summary layer {named!r}, not {exported.summary_file!r}: "
            "export the model again"
        )
    return exported


def settings_of(path: str | Path) -> Exported | None:
    """Return what the config of a folder or Hugging Face id says about Skip-Vision; None if nothing.

    Raises:
        AdapterError: the entry is damaged; the message names ``path``.
        ConfigError: the config cannot be loaded.
    """
    try:
        return exported_settings(load_config(path))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def exported_summary(path: str | Path, exported: Exported) -> SummaryLayer | None:
    """Load the summary layer of an exported model to the CPU; None without summary tokens.

    Args:
        path: the exported folder, or its Hugging Face id.
        exported: what its config says.

    Raises:
        AdapterError: the file is missing or damaged, or has another size than the config says.
    """
    if exported.skip is None or exported.summary_file is None:
        return None
    try:
        file = find_file(path, exported.summary_file)
    except ConfigError as error:
        raise AdapterError(str(error)) from error
    tokens = exported.skip.summary_tokens
    weights = read_summary(file, exported.hidden_size, tokens)
    layer = SummaryLayer(exported.hidden_size, tokens, dtype=weights["norm.weight"].dtype)
    layer.load_state_dict(weights)
    return layer.requires_grad_(False).eval()
