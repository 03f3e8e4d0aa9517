"""vLLM's Qwen2.5-VL with pruned images."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.integrations.vllm.model import SkipMRoPEModel
from skipvision.integrations.vllm.positions import grid_positions
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in Qwen2.5-VL prompts."""


class Processor(SkipProcessor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts of Qwen2.5-VL with pruned images."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder)
class SkipQwen25VL(SkipMRoPEModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL, whose images are pruned."""

    def _relative_positions(self, images: list[ImageSettings], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        return grid_positions(kwargs["image_grid_thw"], self.config.vision_config.spatial_merge_size)
