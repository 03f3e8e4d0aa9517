"""Qwen3-VL: its first decoder layers add further features of images (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.integrations.vllm.model import SkipMRoPEModel
from skipvision.integrations.vllm.positions import grid_positions
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, Qwen3VLProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in Qwen3-VL prompts."""


class Processor(SkipProcessor, Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts of Qwen3-VL with pruned images."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen3VLDummyInputsBuilder)
class SkipQwen3VL(SkipMRoPEModel, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen3-VL with pruned images."""

    def _width(self, embeds: torch.Tensor) -> int:
        return int(self.visual_dim + self.multiscale_dim)

    def _relative_positions(self, images: list[ImageSettings], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return grid_positions(kwargs["image_grid_thw"], self.config.vision_config.spatial_merge_size)
