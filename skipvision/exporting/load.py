"""Load an exported model with Skip-Vision attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from skipvision.attach import attach, attachment_of
from skipvision.errors import AdapterError
from skipvision.exporting.read import Exported, exported_settings, exported_summary
from skipvision.loading import load_config, load_model


def from_exported(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model that `export` wrote, with Skip-Vision attached as it was tuned.

    `attachment_of` returns its attachment. A model that was tuned with full tokens gets none.
    ``AutoModelForImageTextToText.from_pretrained`` loads the same folder with full tokens.

    Args:
        path: the exported folder, or its Hugging Face id.
        options: further arguments of ``from_pretrained``: ``dtype``, ``attn_implementation`` …

    Raises:
        AdapterError: no such folder was exported, or its entry or summary layer is damaged.
        ConfigError: the model cannot be loaded.
    """
    exported = settings_of(path)
    if exported is None:
        raise AdapterError(
            f"{path}: its config.json does not name Skip-Vision: export the model with skipvision.export or "
            "jobs/export.py, or load a base model and call skipvision.attach"
        )
    summary = exported_summary(path, exported)
    model = load_model(path, **options)
    attach_exported(model, exported, summary)
    return model


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


def attach_exported(model: nn.Module, exported: Exported, summary: nn.Module | None) -> None:
    """Attach Skip-Vision to the loaded model of an exported folder."""
    if exported.skip is None:
        return
    attach(model, exported.skip)
    attachment = attachment_of(model)
    if summary is not None and attachment is not None and attachment.summary is not None:
        attachment.summary.load_state_dict(summary.state_dict())
        attachment.summary.requires_grad_(False)
