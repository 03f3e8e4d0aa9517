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
    if (folder / _PEFT_CONFIG).exists():
        try:
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
        except (RuntimeError, ValueError, SafetensorError, OSError) as error:
            raise AdapterError(
                f"{folder} does not fit this model, or its files are damaged: {error}"
            ) from error
    if skip is not None:
        _load_summary(attach(model, skip), folder, is_trainable)
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
        known = saved["format"] == _FORMAT and isinstance(saved["hidden_size"], int)
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
        "hidden_size": dissect(model).hidden_size,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _load_summary(attachment: Attachment, folder: Path, is_trainable: bool) -> None:
    if attachment.summary is None:
        return
    path = folder / SUMMARY_WEIGHTS
    try:
        attachment.summary.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        attachment.detach()
        raise AdapterError(f"{path}: the summary layer cannot be loaded: {error}") from error
    attachment.summary.requires_grad_(is_trainable)


def _difference(saved: SkipConfig | None, asked: SkipConfig) -> str:
    if saved is None:
        return f"it has none (full tokens), not {asked!r}"
    before, now = saved.model_dump(), asked.model_dump()
    return ", ".join(
        f"{name} is {before[name]!r}, not {now[name]!r}" for name in before if before[name] != now[name]
    )


def _replace(partial: Path, folder: Path) -> None:
    if folder.exists():
        if not (folder / SKIP_CONFIG).exists() and any(folder.iterdir()):
            raise AdapterError(f"{folder} exists and is not an adapter: it is not overwritten")
        shutil.rmtree(folder)
    partial.rename(folder)
