"""Any family that vLLM runs by transformers' modules (``--model-impl transformers``), with pruned images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
    TransformersMultiModalMoEForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from skipvision.integrations.vllm.model import SkipModel
from skipvision.integrations.vllm.processing import SkipInfo, SkipProcessor


class Info(SkipInfo, MultiModalProcessingInfo):  # type: ignore[misc]
    """Counts the visual tokens of images in prompts, by the model's own processor."""


class Processor(SkipProcessor, MultiModalProcessor):  # type: ignore[misc]
    """Prepares prompts with pruned images, by the model's own processor."""


class _OneAxis(SkipModel):
    """`SkipModel`, except where the model has M-RoPE of its own and runs with full tokens only."""

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Number a prompt as `SkipModel` does; with M-RoPE of its own, as the model does."""
        if self._skip_carries:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        numbered: tuple[torch.Tensor, int] = super(SkipModel, self).get_mrope_input_positions(  # type: ignore[misc]
            input_tokens, mm_features
        )
        return numbered

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder; ours are the first axis of the positions, which `MultiModalMixin` would keep."""
        if not self._skip_carries:
            return super(SkipModel, self).forward(  # type: ignore[misc]
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        own = positions[0] if positions.ndim == 2 else positions
        return super(MultiModalMixin, self).forward(input_ids, own, intermediate_tensors, inputs_embeds)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=MultiModalDummyInputsBuilder)
class SkipTransformers(_OneAxis, TransformersMultiModalForCausalLM):  # type: ignore[misc]
    """A model of transformers, whose images are pruned."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=MultiModalDummyInputsBuilder)
class SkipTransformersMoE(_OneAxis, TransformersMultiModalMoEForCausalLM):  # type: ignore[misc]
    """A mixture of experts of transformers, whose images are pruned."""
