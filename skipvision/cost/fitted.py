"""Costs per token, pair and chunk, fitted to the counted FLOPs or bytes of a few short runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from skipvision.cost.dry_run import DryRun
from skipvision.cost.flops import measure_flops

SHORT = 8
"""Tokens of the shortest run."""
CHUNK = 64
"""Tokens that linear attention computes together in a prompt if its config does not say (``chunk_size``);
transformers pads the last chunk."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of a run: per token, per pair of query and key, and per token in the feed-forward networks.

    ``chunk`` are those of linear attention per ``length`` tokens of a prompt; decode steps compute none.
    """

    token: int
    pair: int
    ffn: int
    chunk: int = 0
    length: int = CHUNK

    def __call__(self, queries: int, keys: int, ffn_tokens: int) -> int:
        chunks = self.chunk * math.ceil(queries / self.length) if queries > 1 else 0
        return self.token * queries + self.pair * queries * keys + self.ffn * ffn_tokens + chunks

    def minus(self, part: Flops) -> Flops:
        """Return what the run costs without a part of it."""
        return Flops(self.token - part.token, self.pair - part.pair, self.ffn - part.ffn)

    @classmethod
    def fitted(cls, run: Callable[[int, int], Any], length: int) -> Self:
        """Fit costs from three calls of ``run(tokens, ffn_tokens)``, or five with linear attention."""
        n = length or SHORT
        sizes = [(n, n), (2 * n, 2 * n), (2 * n, n)] + [(n + 1, n + 1), (n + 2, n + 2)] * bool(length)
        with DryRun():
            short, long, part, *longer = (measure_flops(partial(run, *each)) for each in sizes)
        ffn, pair = (long - part) // n, (long - 2 * short) // (2 * n * n)
        chunk = _chunk(short, longer, pair) if length else 0
        return cls((short - chunk) // n - pair * n - ffn, pair, ffn, chunk, length or CHUNK)


@dataclass(frozen=True)
class ProbeFlops:
    """FLOPs of a probing run: a fixed part, and a part per token, per pair of tokens, and per chunk."""

    fixed: int
    token: int
    pair: int
    chunk: int = 0
    length: int = CHUNK

    def __call__(self, tokens: int) -> int:
        chunks = self.chunk * math.ceil(tokens / self.length)
        return self.fixed + self.token * tokens + self.pair * tokens**2 + chunks

    @classmethod
    def fitted(cls, run: Callable[[int], Any], length: int) -> Self:
        """Fit costs from three calls of ``run(tokens)``, or five with linear attention."""
        n = length or SHORT
        sizes = [n, 2 * n, 3 * n] + [n + 1, n + 2] * bool(length)
        with DryRun():
            one, two, three, *longer = (measure_flops(partial(run, each)) for each in sizes)
        pair = (three - 2 * two + one) // (2 * n * n)
        chunk = _chunk(one, longer, pair) if length else 0
        token = (two - one - chunk) // n - 3 * n * pair
        return cls(one - token * n - pair * n * n - chunk, token, pair, chunk, length or CHUNK)


def fit_bytes(count: Callable[[int, int], int], length: int) -> Flops:
    """Fit the bytes of a token, and of a token in the feed-forward networks, to four short runs.

    Bytes that do not depend on the tokens, and those of pairs of tokens, which fused attention does not keep,
    are left out.

    Args:
        count: ``count(tokens, ffn_tokens)`` runs the model and returns the bytes.
        length: as in `Flops.fitted`.
    """
    n = length or SHORT
    with DryRun():
        one, two, three, part = (
            count(*size) for size in ((n, n), (2 * n, 2 * n), (3 * n, 3 * n), (2 * n, n))
        )
    pair = (three - 2 * two + one) / (2 * n * n)
    ffn = (two - part) // n
    return Flops(round((two - one) / n - 3 * n * pair) - ffn, 0, ffn)


def _chunk(full: int, longer: list[int], pair: int) -> int:
    """Return the FLOPs of a chunk, by runs of one full chunk and of one and two tokens more."""
    one_more, two_more = longer
    return (one_more - full) - (two_more - one_more) + 2 * pair
