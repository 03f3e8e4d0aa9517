"""Choose the next token of every row, each by its own settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipvision.engine.generation import MIN_TEMPERATURE
from skipvision.engine.requests import Sampling, TokenLogprob


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Apply a repetition penalty (https://arxiv.org/abs/1909.05858, section 4.1).

    Args:
        logits: (V,).
        seen: (n,) ids of tokens that have occurred.
        penalty: above 1 makes them less likely.
    """
    chosen = logits[seen]
    return logits.index_put((seen,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def choose(logits: torch.Tensor, settings: Sequence[Sampling], draws: torch.Tensor) -> torch.Tensor:
    """Choose one token for each row.

    Args:
        logits: (R, V), float32 or wider; no NaN, no +∞, and at least one above −∞ in each row.
        settings: settings of each row's request.
        draws: (R,) uniform in [0, 1); used by rows with temperature > 0.

    Returns:
        (R,) token ids.
    """
    likeliest = logits.argmax(dim=1)
    drawn = [row for row, setting in enumerate(settings) if setting.temperature > 0]
    if not drawn:
        return likeliest
    at = torch.tensor(drawn, device=logits.device)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    temperature = column([max(settings[row].temperature, MIN_TEMPERATURE) for row in drawn])
    chosen = logits[at]
    # Relative to the maximum, so that dividing by a small temperature cannot overflow.
    relative = chosen - chosen.amax(dim=1, keepdim=True)
    ordered, ids = (relative / temperature).sort(dim=1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    top_k = column([min(settings[row].top_k or len(rank), len(rank)) for row in drawn])
    probabilities = ordered.masked_fill(rank >= top_k, -torch.inf).softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    top_p = column([1.0 if (p := settings[row].top_p) is None else p for row in drawn])
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    # The likeliest token stays possible, however top_p and rounding fall.
    probabilities[:, 0] = probabilities[:, 0].clamp(min=torch.finfo(probabilities.dtype).tiny)
    cumulative = probabilities.cumsum(dim=1)
    target = draws.to(cumulative)[at, None] * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True)
    last = (probabilities > 0).sum(dim=1, keepdim=True) - 1
    return likeliest.index_put((at,), ids.gather(1, torch.minimum(choice, last)).squeeze(1))


def report(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Return the log probability of each row's chosen token, for the rows that request it.

    Args:
        logits: (R, V) of the model.
        tokens: the chosen token of each row.
        counts: number of likeliest tokens that each row requests; None = no report.
    """
    rows = [row for row, count in enumerate(counts) if count is not None]
    reports: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return reports
    logprobs = logits[rows].log_softmax(dim=1)
    largest = min(max(counts[row] or 0 for row in rows), logprobs.shape[1])
    top, ids = (tensor.tolist() for tensor in logprobs.topk(largest, dim=1))
    chosen = logprobs[range(len(rows)), [tokens[row] for row in rows]].tolist()
    for at, row in enumerate(rows):
        count = counts[row] or 0
        reports[row] = TokenLogprob(
            tokens[row], chosen[at], tuple(zip(ids[at][:count], top[at][:count], strict=True))
        )
    return reports
