"""Memory of activations that a training row keeps for its backward, measured without weights."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, cast

import torch

from skipvision.anatomy.families import dissect, lm_head
from skipvision.cost.fitted import Flops, fit_bytes
from skipvision.cost.kept import KeptTensors
from skipvision.cost.running import Built, Design, Numbers, built, end_of, run, training_mode


def kept(
    design: Design,
    rank: int,
    below: bool,
    dtype: torch.dtype,
    skipping: Numbers = None,
    last: int | None = None,
) -> Flops:
    """Measure the bytes that a forward through the decoder keeps, with an attention that is fused.

    Args:
        design: the model's.
        rank, below, skipping, last: as in `units.training`.
        dtype: of the frozen weights and of the matrix products.
    """
    return _kept(design, rank, below, dtype, skipping, last)


@lru_cache(maxsize=64)
def _kept(
    design: Design, rank: int, below: bool, dtype: torch.dtype, skipping: Numbers, last: int | None
) -> Flops:
    model = built(design)
    if dtype != torch.float32:
        whole = copy.deepcopy(model.whole).to(dtype)  # type: ignore[arg-type]
        model = Built(whole, dissect(whole), model.weights)
    end = end_of(model, last)

    def count(tokens: int, ffn_tokens: int) -> int:
        with torch.enable_grad(), KeptTensors(model.whole) as tensors:
            run(model, end, tokens, ffn_tokens, skipping)
        return tensors.bytes

    with training_mode(model, rank, below):
        return fit_bytes(count, model.chunk)


def logits(design: Design) -> int:
    """Count the bytes of one token's log probabilities, which the cross-entropy keeps in float32."""
    head = cast(Any, lm_head(built(design).whole)).weight
    return int(head.shape[0]) * torch.float32.itemsize
