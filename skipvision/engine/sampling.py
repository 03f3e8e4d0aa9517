"""The next token of every running answer, each by its own settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipvision.engine.requests import Sampling, TokenLogprob

_COLDEST = 1e-6
"""Temperature below which nothing but the likeliest token has a chance anyway."""


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that were seen less likely (https://arxiv.org/abs/1909.05858, section 4.1).

    Args:
        logits: (V,).
        seen: (n,) ids.
        penalty: above 1 makes them rarer.
    """
    chosen = logits[seen]
    return logits.index_put((seen,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def choose(logits: torch.Tensor, settings: Sequence[Sampling], draws: torch.Tensor) -> torch.Tensor:
    """One token a row.

    Args:
        logits: (R, V), float32 or wider; no NaN, no +∞, and something above −∞ in each row.
        settings: of each row.
        draws: (R,) uniform in [0, 1); looked at where temperature > 0.

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

    heat = column([max(settings[row].temperature, _COLDEST) for row in drawn])
    chosen = logits[at]
    # Behind the likeliest, so that no temperature is cold enough to overflow.
    ordered, ids = ((chosen - chosen.amax(dim=1, keepdim=True)) / heat).sort(
        dim=1, descending=True, stable=True
    )
    rank = torch.arange(ordered.shape[1], device=logits.device)
    most = column([min(settings[row].top_k or len(rank), len(rank)) for row in drawn])
    ordered = ordered.masked_fill(rank >= most, -torch.inf)
    chances = ordered.softmax(dim=1)
    before = chances.cumsum(dim=1) - chances
    chances = chances.masked_fill(before >= column([settings[row].top_p for row in drawn]), 0)
    # The first of a row always stays, whatever rounding does to top_p.
    chances[:, 0] = chances[:, 0].clamp(min=torch.finfo(chances.dtype).tiny)
    reached = chances.cumsum(dim=1)
    wanted = draws.to(reached)[at, None] * reached[:, -1:]
    place = torch.searchsorted(reached, wanted, right=True)
    last = (chances > 0).sum(dim=1, keepdim=True) - 1
    return likeliest.index_put((at,), ids.gather(1, torch.minimum(place, last)).squeeze(1))


def report(
    logits: torch.Tensor, tokens: Sequence[int], asked: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Log probabilities of the tokens taken, for the rows that asked.

    Args:
        logits: (R, V) of the model.
        tokens: taken, one a row.
        asked: how many of the likeliest each row wants; None = nothing.
    """
    rows = [row for row, count in enumerate(asked) if count is not None]
    reports: list[TokenLogprob | None] = [None] * len(tokens)
    if not rows:
        return reports
    logprobs = logits[rows].log_softmax(dim=1)
    most = min(max(asked[row] or 0 for row in rows), logprobs.shape[1])
    top, ids = (found.tolist() for found in logprobs.topk(most, dim=1))
    taken = logprobs[range(len(rows)), [tokens[row] for row in rows]].tolist()
    for at, row in enumerate(rows):
        count = asked[row] or 0
        reports[row] = TokenLogprob(
            tokens[row], taken[at], tuple(zip(ids[at][:count], top[at][:count], strict=True))
        )
    return reports
