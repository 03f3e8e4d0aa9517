"""The entry point by which lmms-eval finds the model, in its group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry is told: the model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="skipvision", simple_class_path="skipvision.integrations.lmms_eval.model.SkipVision"
    )
