"""The entry point of lmms-eval's group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the model's name and class for lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="skipvision", simple_class_path="skipvision.integrations.lmms_eval.model.SkipVision"
    )
