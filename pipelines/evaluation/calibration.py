"""Calibration: how well the probability of an answer predicts that it is right.

The probability of an answer is that of its text and its end under the model: the product of its tokens'
probabilities. Its score, a fraction of its points, says how right it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import FEW_CHANGES, Difference, Sides, aligned, paired_by_seed, widened

BINS = 10
"""The number of bins of the calibration error: probabilities 0 to 0.1, 0.1 to 0.2, and so on."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of one system, and its number of answers.

    Attributes:
        ece: the expected calibration error: the mean, over answers, of the distance between mean probability
            and mean score of their bin (Guo et al., arXiv 1706.04599, equation 3). With few answers it is too
            high, because chance alone separates the two means.
        brier: the mean squared distance between probability and score (Brier, 1950); 0 is best, and always
            answering with probability 1 gives the share of wrong answers.
        items: the number of answers.
    """

    ece: float
    brier: float
    items: int


def calibration(items: Sequence[Item]) -> Calibration | None:
    """Return the calibration of answers, or None if the probability of one is unknown.

    Items with an error have no answer and do not count.
    """
    if not is_measured(items):
        return None
    answered = [item for item in items if item.error is None]
    sums = _sums_by_bin(answered, np.zeros(len(answered), dtype=int), 1)
    ece = float(np.abs(sums).sum() / len(answered))
    brier = math.fsum(_brier(item).score for item in answered) / len(answered)
    return Calibration(ece, brier, len(answered))


def is_measured(items: Sequence[Item]) -> bool:
    """Return whether there are answers, and the probability of each is known."""
    answered = [item for item in items if item.error is None]
    return bool(answered) and all(item.log_probability is not None for item in answered)


def compare_calibration(
    sides: Sides, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[Difference, Difference] | None:
    """Compare the calibration of two systems, under one or several seeds: ECE, then Brier score.

    The intervals are those of `paired_by_seed`. The ECE is computed anew in each resample; with fewer than
    `FEW_CHANGES` groups its interval is -1 to 1. With several seeds both numbers are means over the seeds.

    Returns:
        The differences; None if the probability of an answer is unknown.

    Raises:
        DataError: see `paired_by_seed`.
    """
    if not all(is_measured(items) for side in sides for items in side):
        return None
    failed = {item.key for side in sides for items in side for item in items if item.error is not None}
    kept = [tuple([item for item in items if item.key not in failed] for items in side) for side in sides]
    answered = [(reference, other) for reference, other in kept]
    if not answered[0][0]:
        return None
    scores = [([*map(_brier, before)], [*map(_brier, after)]) for before, after in answered]
    brier = widened(paired_by_seed(scores, resamples=resamples, seed=seed, confidence=confidence), confidence)
    ece = _compare_ece(answered, resamples=resamples, seed=seed, confidence=confidence)
    return ece, brier.numbers()


def _compare_ece(sides: Sides, *, resamples: int, seed: int, confidence: float) -> Difference:
    pairs, groups = aligned(sides)
    sizes = np.bincount(groups)
    # (seeds, 2, groups, bins): what each group adds to the sums of the reference and of the other system.
    sums = np.array([[_sums_by_bin(items, groups, len(sizes)) for items in side] for side in pairs])
    reference, other = (np.abs(sums.sum(axis=2)).sum(axis=2) / sizes.sum()).mean(axis=0).tolist()
    low, high = -1.0, 1.0
    if len(sizes) >= FEW_CHANGES:
        rng = np.random.default_rng(seed)
        drawn_groups = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
        drawn_seeds = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=resamples)
        errors = np.abs(drawn_groups @ sums).sum(axis=3) / (drawn_groups @ sizes)  # (seeds, 2, resamples)
        gains = ((errors[:, 1] - errors[:, 0]) * drawn_seeds.T).sum(axis=0) / len(pairs)
        low, high = np.quantile(gains, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Difference(other - reference, low, high, reference, other)


def _sums_by_bin(items: Sequence[Item], groups: np.ndarray, count: int) -> np.ndarray:
    """Return the sums of probability minus score by group and bin, (groups, bins).

    The part of a bin in the ECE is the absolute sum over its answers, divided by the number of all answers.
    """
    probabilities = np.array([_probability(item) for item in items])
    gaps = probabilities - np.array([item.score for item in items])
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return np.bincount(groups * BINS + bins, gaps, minlength=count * BINS).reshape(count, BINS)


def _brier(item: Item) -> Item:
    return replace(item, score=(_probability(item) - item.score) ** 2)


def _probability(item: Item) -> float:
    # Sums of rounded logarithms may be a little above 0.
    return math.exp(min(item.log_probability or 0.0, 0.0))
