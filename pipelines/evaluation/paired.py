"""What the scores of two systems on the same items say about their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.evaluation.items import Item
from skipvision.errors import DataError

FEW_CHANGES = 10
"""Below so many groups with another score, a bootstrap has too little to draw from."""

_NOTHING = 1e-9
"""Sums of fractions differ by less, if they are the same."""


@dataclass(frozen=True)
class Paired:
    """Two systems on the same items; all scores and differences are fractions.

    Attributes:
        difference: mean score of the other system minus that of the reference.
        low: lower end of the difference's confidence interval.
        high: upper end.
        p_mcnemar: two-sided exact p-value of "both are right equally often"; None unless all scores are
            0 or 1. It takes items as independent, which the interval does not.
        reference: mean score of the reference.
        other: mean score of the other system.
        items: how many items both answered, under all seeds together.
        groups: how many groups they form.
        lost: groups in which the other system scored less.
        changed: groups in which it scored less or more.
    """

    difference: float
    low: float
    high: float
    p_mcnemar: float | None
    reference: float
    other: float
    items: int
    groups: int
    lost: int
    changed: int


def paired(
    reference: Sequence[Item],
    other: Sequence[Item],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Paired:
    """Compare two systems item by item, paired by dataset and index.

    The interval is the percentile bootstrap's, and it draws groups, not items: questions about one picture
    are not independent. It knows only of changes it has seen: with few of them it is too narrow, see
    `widened`.

    Raises:
        DataError: there are no items, or some that only one system answered, or one twice, or one that is
            about another image or in another category on the other side.
    """
    return paired_by_seed([(reference, other)], resamples=resamples, seed=seed, confidence=confidence)


def paired_by_seed(
    sides: Sequence[tuple[Sequence[Item], Sequence[Item]]],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Paired:
    """`paired` over several trainings of both systems: (reference, other) under each seed.

    All seeds answer the same items. A resample draws seeds, then groups, the same under all seeds drawn: so
    the interval knows that another seed, too, would have given another difference. Of two or three seeds it
    still sees too little of that.

    Raises:
        DataError: as of `paired`, or the seeds were not asked the same.
    """
    keyed = [(_by_key(reference), _by_key(other)) for reference, other in sides]
    first = keyed[0][0]
    for theirs, ours in keyed:
        _check_same(first, theirs)
        _check_same(theirs, ours)
    before = np.array([[theirs[key].score for key in first] for theirs, _ in keyed])
    after = np.array([[ours[key].score for key in first] for _, ours in keyed])
    names = [(item.dataset, item.group) for item in first.values()]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    groups = np.array([numbers[name] for name in names])
    counts = np.bincount(groups)
    totals = np.array([np.bincount(groups, gains) for gains in after - before])
    low, high = np.quantile(_resampled(totals, counts, resamples, seed), _tails(confidence))
    by_group = totals.sum(axis=0)
    return Paired(
        difference=float(by_group.sum() / before.size),
        low=float(low),
        high=float(high),
        p_mcnemar=_mcnemar(before, after),
        reference=float(before.mean()),
        other=float(after.mean()),
        items=before.size,
        groups=len(counts),
        lost=int((by_group < -_NOTHING).sum()),
        changed=int((np.abs(by_group) > _NOTHING).sum()),
    )


def exact_mcnemar(lost: int, gained: int) -> float:
    """Two-sided p-value of at least so uneven a split of the items on which two systems differ."""
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def exact_loss_bound(lost: int, groups: int, confidence: float) -> float:
    """Upper end of the exact binomial (Clopper–Pearson) interval of the share of groups that lose."""
    if lost >= groups:
        return 1.0
    tail = _tails(confidence)[0]
    low, high = lost / groups, 1.0
    for _ in range(50):
        share = (low + high) / 2
        seen = sum(math.comb(groups, k) * share**k * (1 - share) ** (groups - k) for k in range(lost + 1))
        low, high = (share, high) if seen > tail else (low, share)
    return high


def widened(found: Paired, confidence: float = 0.95) -> Paired:
    """A comparison whose interval does not claim more than its groups can show.

    Where fewer than `FEW_CHANGES` groups changed, its ends are at least the exact bounds of the shares of
    groups that lose and that gain; each such group is taken as lost or gained whole.
    """
    if found.changed >= FEW_CHANGES:
        return found
    loss, gain = (
        exact_loss_bound(changed, found.groups, confidence)
        for changed in (found.lost, found.changed - found.lost)
    )
    return replace(found, low=min(found.low, -loss), high=max(found.high, gain))


def _by_key(items: Sequence[Item]) -> dict[tuple[str, str], Item]:
    found = {(item.dataset, item.index): item for item in items}
    if len(found) < len(items):
        raise DataError(
            f"{len(items) - len(found)} of {len(items)} items of {items[0].system!r} are there again: "
            "dataset and index name an item, and a system answers it once"
        )
    return found


def _check_same(reference: Mapping[tuple[str, str], Item], other: Mapping[tuple[str, str], Item]) -> None:
    only = [len(reference.keys() - other.keys()), len(other.keys() - reference.keys())]
    if any(only):
        dataset, index = min(reference.keys() ^ other.keys())
        raise DataError(
            f"the systems were not asked the same: {only[0]} of the reference's {len(reference)} items are "
            f"missing on the other side, and {only[1]} of the other's {len(other)} on the reference's "
            f"({dataset} {index}, for one); score both on the same datasets"
        )
    if not reference:
        raise DataError("there are no items to compare")
    differing = [item for key, item in reference.items() if _about(item) != _about(other[key])]
    if differing:
        one = differing[0]
        raise DataError(
            f"{len(differing)} of {len(reference)} items are about another image or in another category on "
            f"the other side ({one.dataset} {one.index}: {_about(one)} and "
            f"{_about(other[one.dataset, one.index])}, for one): score both on the same tables"
        )


def _about(item: Item) -> tuple[str, str]:
    return item.group, item.category


def _resampled(totals: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Mean differences of random draws of as many seeds and groups as there are, with replacement.

    Args:
        totals: sums of differences, (seeds, groups).
        counts: items of a group, (groups,).
        resamples: draws.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        gains = totals[rng.integers(0, len(totals), len(totals))].mean(axis=0)
        draw = rng.integers(0, len(counts), len(counts))
        means.append(gains[draw].sum() / counts[draw].sum())
    return np.array(means)


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _mcnemar(before: np.ndarray, after: np.ndarray) -> float | None:
    if not np.isin([before, after], (0.0, 1.0)).all():
        return None
    return exact_mcnemar(int((after < before).sum()), int((after > before).sum()))
