"""LLaVA-NeXT: a view of the whole image, then high-resolution crops."""

from __future__ import annotations

import torch
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.integrations.vllm.model import SkipModel
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, LlavaNextProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in LLaVA-NeXT prompts."""


class Processor(SkipProcessor, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts of LLaVA-NeXT with pruned images."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class SkipLlavaNext(SkipModel, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """vLLM's LLaVA-NeXT with pruned images."""

    def _base_views(
        self, features: list[torch.Tensor], images: list[ImageSettings]
    ) -> list[torch.Tensor] | None:
        vision = self.config.vision_config
        view = (vision.image_size // vision.patch_size) ** 2
        return [torch.arange(len(image), device=image.device) < view for image in features]
