"""Private names of transformers' `generate` that the package uses, and the version they were last seen in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

__all__ = ["generation_position_ids", "logits_processors"]


def generation_position_ids(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Return the position ids with which `generate` prefills a prompt.

    Args:
        model: that generates.
        input_ids: (B, T).
        model_kwargs: the model's other inputs, with ``past_key_values``.

    Returns:
        (B, T), or (A, B, T) for a model with A position axes.

    Seen in: transformers 5.23.
    """
    generating: Any = model
    return generating._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))


def logits_processors(
    model: PreTrainedModel,
    settings: GenerationConfig,
    prompt: torch.Tensor,
    further: Sequence[LogitsProcessor] = (),
) -> LogitsProcessorList:
    """Return what `generate` applies to the logits of each token, in its order.

    Args:
        model: that generates.
        settings: of the answer; ``max_length`` counts the prompt, too.
        prompt: (1, T) ids.
        further: applied before those of sampling, as `generate` applies its argument ``logits_processor``.

    Seen in: transformers 5.16 and 5.23.
    """
    generating: Any = model
    prepared: Any = copy(settings)
    eos = settings.eos_token_id
    prepared._eos_token_tensor = (
        None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos, device=prompt.device)
    )
    processors: LogitsProcessorList = generating._get_logits_processor(
        generation_config=prepared,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(further),
        device=prompt.device,
        model_kwargs={},
    )
    return processors
