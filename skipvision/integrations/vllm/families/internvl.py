"""InternVL in the format of transformers: tiles of an image, and last a thumbnail of all of it."""

from __future__ import annotations

import torch
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.integrations.vllm.model import SkipModel
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, InternS1ProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in InternVL prompts."""


class Processor(SkipProcessor, InternS1MultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts of InternVL with pruned images."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=InternS1DummyInputsBuilder)
class SkipInternVL(SkipModel, InternS1ForConditionalGeneration):  # type: ignore[misc]
    """vLLM's class for InternVL with pruned images."""

    def _base_views(
        self, features: list[torch.Tensor], images: list[ImageSettings]
    ) -> list[torch.Tensor] | None:
        tile = self.num_image_token
        return [torch.arange(len(image), device=image.device) >= len(image) - tile for image in features]
