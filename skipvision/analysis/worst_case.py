"""The worst-case bound of the error of skipping the FFN, from spectral norms and activation sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skipvision.analysis.lipschitz import AttentionBound, Normed, Parts, ffn_constant
from skipvision.analysis.runs import Pair
from skipvision.errors import UnsupportedModelError

_CLOSE = 1e-2


@dataclass(frozen=True)
class WorstCase:
    """Bounds and Lipschitz constants, all absolute.

    Attributes:
        errors: bound of ‖e‖ over all tokens after each layer.
        output: the same bound after the decoder's last norm.
        attention: Lipschitz constant of each attention with its norm, in the maximum norm over tokens.
        ffn: Lipschitz constant of each layer's FFN with its norm.
    """

    errors: list[float]
    output: float
    attention: list[float]
    ffn: list[float]


@torch.no_grad()
def worst_case(pair: Pair, parts: Sequence[Parts]) -> WorstCase:
    """Propagate the error of each token through attention and FFN of each layer.

    Raises:
        UnsupportedModelError: a layer is not h + attention + FFN, or its norms are of an unknown kind.
    """
    runs = pair.full, pair.bypass
    rotary = getattr(pair.anatomy.decoder, "rotary_emb", None)
    stretch = float(getattr(rotary, "attention_scaling", 1.0))  # YaRN's and LongRoPE's are not 1
    error = torch.zeros_like(pair.full.hidden[0][0, :, 0], dtype=torch.double)
    errors, attention, ffn = [], [], []
    for number, part in enumerate(parts):
        before = [run.hidden[number] for run in runs]
        middle = [run.hidden[number] + run.seen[part.halves[0]] for run in runs]
        update = [run.seen[part.halves[1]] for run in runs]
        _check_sum(pair, number, middle, update)
        norms = Normed(part.norms[0], *before), Normed(part.norms[1], *middle)
        attend = AttentionBound(part, norms[0], runs, stretch)
        feed = ffn_constant(part, norms[1], runs)
        error = error + attend.bound(norms[0].bound(error))
        omitted = update[0][0].double().norm(dim=-1)
        error = error + torch.where(pair.skipped, omitted, feed * norms[1].bound(error))
        errors.append(float(error.norm()))
        attention.append(attend.constant() * float(norms[0].factor.max()))
        ffn.append(feed * float(norms[1].factor.max()))
    last = Normed(pair.final_norm, *(run.hidden[-1] for run in runs))
    output = float(last.scale.abs().max()) * float(last.bound(error).norm())
    return WorstCase(errors, output, attention, ffn)


def _check_sum(
    pair: Pair, number: int, middle: Sequence[torch.Tensor], update: Sequence[torch.Tensor]
) -> None:
    """Raise `UnsupportedModelError` unless the layer's output is h + attention + FFN."""
    for run, halfway, added in zip((pair.full, pair.bypass), middle, update, strict=True):
        after = run.hidden[number + 1]
        if float((halfway + added - after).norm()) > _CLOSE * float(after.norm()):
            raise UnsupportedModelError(
                f"layer {number} is not h + attention + FFN, so no bound from spectral norms is known: pass "
                "worst_case=False",
                "layers that are not the sum of attention and FFN",
            )
