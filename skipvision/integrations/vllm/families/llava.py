"""vLLM's LLaVA with pruned images."""

from __future__ import annotations

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.model import SkipModel
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, LlavaProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in LLaVA prompts."""


class Processor(SkipProcessor, LlavaMultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts of LLaVA with pruned images."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=LlavaDummyInputsBuilder)
class SkipLlava(SkipModel, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with a CLIP or SigLIP tower, whose images are pruned."""
