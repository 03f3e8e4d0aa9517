"""One folder holds what fine-tuning made: LoRA, summary layer, and the SkipConfig they were made for.

adapter_config.json  adapter_model.safetensors    PEFT's own files, summary layer included
skip_config.json                                  SkipConfig (null: full tokens), shapes, versions
skip_summary.safetensors                          the summary layer, if there is one
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from skipvision.config import SkipConfig
from skipvision.errors import AdapterError
from skipvision.summary import SummaryLayer

SKIP_CONFIG = "skip_config.json"
SUMMARY_WEIGHTS = "skip_summary.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
FORMAT = 1


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """What `save_adapter` noted about an adapter; ``skip`` is its `SkipConfig`, None for full tokens."""
    path = Path(folder) / SKIP_CONFIG
    if not path.exists():
        raise AdapterError(f"{folder} is not a Skip-Vision adapter: it has no {SKIP_CONFIG}")
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        skip = saved["skip"]
        saved["skip"] = None if skip is None else SkipConfig(**skip)
        known = saved["format"] == FORMAT and all(
            isinstance(saved[name], int) for name in ("hidden_size", "layers", "lora")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not known:
        raise AdapterError(f"{path} has format {saved['format']!r}; this version reads format {FORMAT}")
    return saved


def summary_weights(folder: Path, hidden_size: int, summary_tokens: int) -> dict[str, torch.Tensor]:
    """The saved summary layer; raises `AdapterError` unless it is one of this size."""
    path = folder / SUMMARY_WEIGHTS
    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: the adapter's summary layer cannot be read: {error}") from error
    expected = SummaryLayer(hidden_size, summary_tokens, device="meta").state_dict()
    sizes, needed = ({name: tuple(w.shape) for name, w in one.items()} for one in (weights, expected))
    if sizes != needed:
        raise AdapterError(f"{path} does not fit the adapter's settings: it holds {sizes}, not {needed}")
    return weights


def difference(saved: SkipConfig | None, asked: SkipConfig | None) -> str:
    """In words, field by field, how a saved SkipConfig differs from the one asked for."""
    if saved is None or asked is None:
        return f"it has {_said(saved)}, not {_said(asked)}"
    before, now = saved.model_dump(), asked.model_dump()
    return ", ".join(
        f"{name} is {before[name]!r}, not {now[name]!r}" for name in before if before[name] != now[name]
    )


def _said(config: SkipConfig | None) -> str:
    return "none (full tokens)" if config is None else repr(config)


def replace(partial: Path, folder: Path) -> None:
    """Move the new folder into place; the old one goes only when the new one is there."""
    if not folder.exists():
        partial.rename(folder)
        return
    if not (folder / SKIP_CONFIG).exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder} exists and is not an adapter: it is not overwritten")
    old = partial.with_name(f"{partial.name}-old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
