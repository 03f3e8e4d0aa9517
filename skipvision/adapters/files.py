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
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from skipvision.config import SkipConfig
from skipvision.errors import AdapterError
from skipvision.files import check_entries
from skipvision.summaries import SUMMARY
from skipvision.summary import SummaryLayer

SKIP_CONFIG = "skip_config.json"
SUMMARY_WEIGHTS = "skip_summary.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
FORMAT = 1

_PEFT_CONFIG, _PEFT_WEIGHTS = PEFT_FILES
_READ_BY_PEFT = ("megatron_config", "corda_config", "eva_config", "lora_ga_config", "runtime_config")
"""Fields of PEFT's config that name modules to import or other files to read, once they are set."""
_NO_LAYERS = (
    "ADAPTION_PROMPT",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "XLORA",
)
"""Types of PEFT that add tokens, or load further models or adapters, instead of changing layers."""


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Read an adapter's ``skip_config.json``; ``skip`` is its `SkipConfig`, or None for full tokens.

    Raises:
        AdapterError: the folder holds no adapter or cannot be read, or its weights are pickled or its PEFT
            config reads other files or modules, so that loading it could run code.
    """
    path = Path(folder) / SKIP_CONFIG
    _check_entries(Path(folder))
    if not path.exists():
        raise AdapterError(
            f"{folder} is not a Skip-Vision adapter: it has no {SKIP_CONFIG}; {_remedy(Path(folder))}"
        )
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        skip = saved["skip"]
        saved["skip"] = None if skip is None else SkipConfig(**skip)
        known = saved["format"] == FORMAT and all(
            isinstance(saved[name], int) for name in ("hidden_size", "layers", "lora")
        )
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not known:
        raise AdapterError(f"{path} has format {saved['format']!r}; this version reads format {FORMAT}")
    if saved["lora"]:
        check_safe(Path(folder))
    return saved


def _remedy(folder: Path) -> str:
    """Return what to do about a folder without ``skip_config.json``."""
    if (folder / PEFT_FILES[0]).exists():
        return (
            "it is a PEFT checkpoint. Call load_adapter(..., config=) with the SkipConfig of the training, "
            "or train with skipvision.adapters.checkpoints.SkipVisionCallback, which writes the file"
        )
    if not folder.is_dir():
        return "there is no such folder"
    inside = sorted(file.parent.name for file in folder.glob(f"*/{PEFT_FILES[0]}"))
    return f"choose a folder in it: {', '.join(inside)}" if inside else "save adapters with save_adapter"


def _check_entries(folder: Path) -> None:
    try:
        if folder.is_dir():
            check_entries(folder)
    except OSError as error:
        raise AdapterError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def check_safe(folder: Path) -> None:
    """Raise `AdapterError` if loading the folder's PEFT adapter could run code."""
    _check_entries(folder)
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not (folder / _PEFT_WEIGHTS).exists():
        raise AdapterError(
            f"{folder}: the adapter's weights are pickled ({pickled.name}), and loading a pickle can run "
            "code: convert them to safetensors (save_pretrained of PEFT writes it)"
        )
    config = folder / _PEFT_CONFIG
    if not config.exists():
        return
    try:
        fields: dict[str, Any] = json.loads(config.read_text())
        found = [name for name in _READ_BY_PEFT if fields.get(name)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{config} cannot be read: {error}") from error
    if found:
        raise AdapterError(
            f"{config} sets {found[0]}, which makes PEFT import a module or read another file: an adapter is "
            "loaded from its own weights only; remove this field"
        )
    if fields.get("peft_type") in _NO_LAYERS:
        raise AdapterError(
            f"{config} has peft_type {fields['peft_type']!r}, which loads more than its own weights: only "
            "adapters of layers, such as LORA, are loaded"
        )


def peft_config(folder: Path) -> PeftConfig | None:
    """Read the PEFT config of an adapter.

    Return None if it has none, or if it cannot be parsed; loading then raises the error.
    """
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder.absolute()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds what PEFT or a trainer saved, without the files of Skip-Vision."""
    return (folder / PEFT_FILES[0]).exists() and not (folder / SKIP_CONFIG).exists()


def weight_names(folder: Path) -> list[str]:
    """Return the names of PEFT's weights in an adapter; none if the file cannot be read."""
    try:
        with safe_open(folder / PEFT_FILES[1], "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []  # `load_adapter` explains what is damaged.


def summary_weights(folder: Path, hidden_size: int, summary_tokens: int) -> dict[str, torch.Tensor]:
    """Read the weights of the saved summary layer; raises `AdapterError` unless they have this size.

    Those of a checkpoint without Skip-Vision's files are among PEFT's.
    """
    checkpoint = is_checkpoint(folder)
    path = folder / (PEFT_FILES[1] if checkpoint else SUMMARY_WEIGHTS)
    return read_summary(path, hidden_size, summary_tokens, among_others=checkpoint)


def read_summary(
    path: Path, hidden_size: int, summary_tokens: int, *, among_others: bool = False
) -> dict[str, torch.Tensor]:
    """Read the weights of a summary layer from a file; raises `AdapterError` unless they have this size.

    Args:
        path: the file.
        hidden_size: width of the decoder.
        summary_tokens: summaries per group.
        among_others: the file holds the weights of a whole adapter.
    """
    try:
        weights = load_file(path)
        if among_others:
            named = ((name.rpartition(f"{SUMMARY}."), weight) for name, weight in weights.items())
            weights = {last: weight for (_, found, last), weight in named if found}
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
    if folder.exists() and not (folder / SKIP_CONFIG).exists() and any(folder.iterdir()):
        raise AdapterError(
            f"{folder} exists and is not an adapter, so it is not overwritten: choose another folder"
        )
    put_in_place(partial, folder, partial.with_name(f"{partial.name}-old"))


def put_in_place(partial: Path, folder: Path, old: Path) -> None:
    """Rename ``partial`` to ``folder``. An old ``folder`` is kept as ``old`` until that has succeeded."""
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
