"""Which models vLLM's Transformers backend can prune, read from their modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from skipvision.anatomy.deepstack import KEYWORDS
from skipvision.anatomy.families import dissect
from skipvision.errors import UnsupportedModelError
from skipvision.loading import build_model


def why_not_pruned(model_config: Any, mrope: bool) -> str | None:
    """Return why images of a model cannot be pruned through the Transformers backend, or None.

    Args:
        model_config: vLLM's ``ModelConfig``.
        mrope: its decoder has M-RoPE.
    """
    prefix = "vLLM's Transformers backend cannot prune images of this model: "
    if mrope:
        return prefix + "its positions have several axes (M-RoPE)"
    if model_config.is_mm_prefix_lm:
        return prefix + "tokens of an image attend to later ones"
    try:
        with torch.device("meta"):
            anatomy = dissect(build_model(model_config.hf_config))
    except UnsupportedModelError as error:
        return f"Skip-Vision does not support this model: {error}"
    if anatomy.family.whole_prompt:
        return prefix + "text around an image depends on it"
    if not all(layer.attends for layer in anatomy.layers):
        return prefix + "some of its layers are no attention layers"
    if set(KEYWORDS) & set(inspect.signature(anatomy.decoder.forward).parameters):
        return prefix + "features of its tower enter several layers (DeepStack)"
    return None
