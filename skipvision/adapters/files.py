"""The files of an adapter folder: LoRA, summary layer, and the SkipConfig that they were trained with.

adapter_config.json  adapter_model.safetensors    PEFT's own files, summary layer included
skip_config.json                                  SkipConfig (null: full tokens), shapes, versions
skip_summary.safetensors                          the summary layer, if it has one
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
    """Read an adapter's ``skip_config.json``; ``skip`` is its `SkipConfig`, or None for full tokens."""
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
    """Read the weights of the saved summary layer; raises `AdapterError` unless they have this size."""
    path = folder / SUMMARY_WEIGHTS
    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: the adapter's summary layer cannot be read: {error}") from error
    expected = SummaryLayer(hidden_size, summary_tokens, device="meta").state_dict()
    shapes, needed = ({name: tuple(w.shape) for name, w in one.items()} for one in (weights, expected))
    if shapes != needed:
        raise AdapterError(f"{path} does not fit the adapter's settings: it has {shapes}, not {needed}")
    return weights


def difference(saved: SkipConfig | None, expected: SkipConfig | None) -> str:
    """Describe, field by field, how a saved SkipConfig differs from the expected one."""
    if saved is None or expected is None:
        return f"it has {_described(saved)}, not {_described(expected)}"
    found, wanted = saved.model_dump(), expected.model_dump()
    return ", ".join(
        f"{name} is {found[name]!r}, not {wanted[name]!r}" for name in found if found[name] != wanted[name]
    )


def _described(config: SkipConfig | None) -> str:
    return "none (full tokens)" if config is None else repr(config)


def replace(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; an old adapter there is deleted once the new one is in place."""
    if not folder.exists():
        partial.rename(folder)
        return
    if not (folder / SKIP_CONFIG).exists() and any(folder.iterdir()):
        raise AdapterError(
            f"{folder} exists and is not an adapter, so it is not overwritten: choose another folder"
        )
    old = partial.with_name(f"{partial.name}-old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
