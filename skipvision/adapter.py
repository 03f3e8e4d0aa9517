"""One folder holds what fine-tuning made: LoRA, summary layer, and the SkipConfig they were made for.

adapter_config.json  adapter_model.safetensors    PEFT's own files
skip_config.json                                  SkipConfig (null: full tokens), shapes, versions
skip_summary.safetensors                          the summary layer, if there is one
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.errors import AdapterError
from skipvision.families import dissect

SKIP_CONFIG = "skip_config.json"
SUMMARY_WEIGHTS = "skip_summary.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_FORMAT = 1


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Save LoRA weights, summary layer and SkipConfig of a fine-tuned model together.

    The folder is written beside its place and moved there whole, so a crash leaves no half adapter.

    Args:
        model: a PEFT model, with or without Skip-Vision attached, or a bare model with it attached.
        folder: destination; an adapter that is there already is replaced.

    Raises:
        AdapterError: the model has neither PEFT adapters nor Skip-Vision: nothing to save.
    """
    attachment = attachment_of(model)
    if attachment is None and not isinstance(model, PeftModel):
        raise AdapterError(
            f"{type(model).__name__} has neither a PEFT adapter nor Skip-Vision attached: nothing to save"
        )
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(partial))
        summary = attachment.summary if attachment is not None else None
        if summary is not None:
            weights = {
                name: value.detach().cpu().contiguous() for name, value in summary.state_dict().items()
            }
            save_file(weights, partial / SUMMARY_WEIGHTS)
        (partial / SKIP_CONFIG).write_text(json.dumps(_describe(model, attachment), indent=2) + "\n")
        partial.chmod(0o755)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, *, config: SkipConfig | None = None, is_trainable: bool = False
) -> nn.Module:
    """Put a saved adapter on its base model: PEFT around it, Skip-Vision attached as it was trained.

    Args:
        model: the base model; it must not have Skip-Vision attached.
        folder: what `save_adapter` wrote.
        config: if given, what the caller believes the adapter was trained with.
        is_trainable: keep LoRA and summary trainable, to go on fine-tuning.

    Returns:
        The PEFT model, or ``model`` itself where the adapter has no LoRA; `attachment_of` finds the
        attachment. An adapter of a full-token fine-tune attaches nothing.

    Raises:
        AdapterError: the folder is missing, damaged, made for another base model, or trained with
            another SkipConfig than ``config``.
    """
    folder = Path(folder)
    saved = read_adapter(folder)
    skip = saved["skip"]
    if config is not None and skip != config:
        raise AdapterError(f"{folder} was trained with another SkipConfig: {_difference(skip, config)}")
    hidden = dissect(model).hidden_size
    if hidden != saved["hidden_size"]:
        raise AdapterError(
            f"{folder} was made for a decoder of hidden size {saved['hidden_size']} "
            f"(base model {saved['base_model']!r}), but this model's is {hidden}"
        )
    if len(dissect(model).layers) != saved["layers"]:
        raise AdapterError(
            f"{folder} was made for a decoder of {saved['layers']} layers (base model "
            f"{saved['base_model']!r}), but this model's has {len(dissect(model).layers)}"
        )
    # Everything is looked at before anything is put on the model.
    weights = _summary_weights(folder) if skip is not None and skip.summary_tokens else None
    if saved["lora"]:
        model = _load_lora(model, folder, is_trainable)
    if skip is not None:
        _fill_summary(attach(model, skip), weights, folder, is_trainable)
    return model


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """What `save_adapter` noted about an adapter; ``skip`` is its `SkipConfig`, None for full tokens."""
    path = Path(folder) / SKIP_CONFIG
    if not path.exists():
        raise AdapterError(f"{folder} is not a Skip-Vision adapter: it has no {SKIP_CONFIG}")
    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        skip = saved["skip"]
        saved["skip"] = None if skip is None else SkipConfig(**skip)
        known = saved["format"] == _FORMAT and all(
            isinstance(saved[name], int) for name in ("hidden_size", "layers", "lora")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not known:
        raise AdapterError(f"{path} has format {saved['format']!r}; this version reads format {_FORMAT}")
    return saved


def _describe(model: nn.Module, attachment: Attachment | None) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "skip": attachment.config.model_dump() if attachment is not None else None,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
        "lora": isinstance(model, PeftModel),
        "hidden_size": dissect(model).hidden_size,
        "layers": len(dissect(model).layers),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _load_lora(model: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    for name in (_PEFT_CONFIG, _PEFT_WEIGHTS):
        # PEFT would take the folder's name for that of a repository and ask the internet for the file.
        if not (folder / name).exists():
            raise AdapterError(f"{folder} is an incomplete adapter: it has no {name}")
    try:
        loaded: nn.Module = PeftModel.from_pretrained(
            model, str(folder.absolute()), is_trainable=is_trainable
        )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, OSError) as error:
        raise AdapterError(f"{folder} does not fit this model, or its files are damaged: {error}") from error
    return loaded


def _summary_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / SUMMARY_WEIGHTS
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: the adapter's summary layer cannot be read: {error}") from error


def _fill_summary(
    attachment: Attachment, weights: dict[str, torch.Tensor] | None, folder: Path, is_trainable: bool
) -> None:
    if attachment.summary is None or weights is None:
        return
    try:
        attachment.summary.load_state_dict(weights)
    except RuntimeError as error:
        attachment.detach()
        raise AdapterError(
            f"{folder / SUMMARY_WEIGHTS} does not fit the adapter's settings: {error}"
        ) from error
    attachment.summary.requires_grad_(is_trainable)


def _difference(saved: SkipConfig | None, asked: SkipConfig) -> str:
    if saved is None:
        return f"it has none (full tokens), not {asked!r}"
    before, now = saved.model_dump(), asked.model_dump()
    return ", ".join(
        f"{name} is {before[name]!r}, not {now[name]!r}" for name in before if before[name] != now[name]
    )


def _replace(partial: Path, folder: Path) -> None:
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
