"""Load an exported model with Skip-Vision attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from skipvision.attach import attach
from skipvision.config import SkipConfig
from skipvision.errors import AdapterError
from skipvision.exporting.read import Exported, exported_summary, settings_of
from skipvision.loading import load_model
from skipvision.summary import SummaryLayer


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
    _attach(model, exported, summary)
    return model


def attach_as_exported(model: nn.Module, path: str | Path) -> SkipConfig | None:
    """Attach Skip-Vision to a model that was loaded from an exported folder; otherwise do nothing.

    Args:
        model: the loaded model.
        path: the folder or Hugging Face id that it was loaded from.

    Returns:
        The SkipConfig that is attached now, or None.

    Raises:
        AdapterError: the entry in its config or the summary layer is damaged.
    """
    exported = settings_of(path)
    if exported is None:
        return None
    _attach(model, exported, exported_summary(path, exported))
    return exported.skip


def _attach(model: nn.Module, exported: Exported, summary: SummaryLayer | None) -> None:
    if exported.skip is None:
        return
    attachment = attach(model, exported.skip)
    if summary is not None and attachment.summary is not None:
        attachment.summary.load_state_dict(summary.state_dict())
        attachment.summary.requires_grad_(False)
