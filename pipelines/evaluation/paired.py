"""Paired statistics: the difference of two systems' scores on the same items, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest, norm

from pipelines.evaluation.items import Item
from skipvision.errors import DataError

FEW_CHANGES = 10
"""With fewer groups whose score changed, the bootstrap has too little to draw from."""

Sides = Sequence[tuple[Sequence[Item], Sequence[Item]]]
"""The items of the reference and of the other system, under each seed."""

_TOLERANCE = 1e-9
"""Sums of the same fractions may differ by rounding, but by less than this."""


@dataclass(frozen=True)
class Difference:
    """The difference of two systems in one number, with the confidence interval ``low`` to ``high``."""

    difference: float
    low: float
    high: float
    reference: float
    other: float


@dataclass(frozen=True)
class Paired:
    """A comparison of two systems on the same items. All scores and differences are fractions.

    Attributes:
        difference: the mean score of the other system minus that of the reference.
        low: the lower end of the confidence interval of the difference.
        high: its upper end.
        p_mcnemar: the two-sided exact p-value of "both are right equally often"; None unless all scores are
            0 or 1. The test treats items as independent; the interval does not.
        reference: the mean score of the reference.
        other: the mean score of the other system.
        items: the number of pairs of items, over all seeds.
        groups: the number of groups that the items form.
        lost: the number of groups in which the other system scored less.
        changed: the number of groups in which it scored less or more.
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

    def numbers(self, scale: float = 1.0) -> Difference:
        """Return the difference without its counts, in units of which ``scale`` make 1."""
        values = (self.difference, self.low, self.high, self.reference, self.other)
        return Difference(*(scale * value for value in values))


def paired(
    reference: Sequence[Item],
    other: Sequence[Item],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Paired:
    """Compare two systems item by item, paired by dataset and index.

    The interval is that of the percentile bootstrap. It draws groups instead of items, because questions
    about one image are not independent. With few changed groups it is too narrow: see `widened`.

    Raises:
        DataError: there are no items, an item has no counterpart, an item occurs twice, or the two sides of
            a pair differ in their image or category.
    """
    return paired_by_seed([(reference, other)], resamples=resamples, seed=seed, confidence=confidence)


def paired_by_seed(sides: Sides, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> Paired:
    """Compare two systems that were trained under several seeds.

    A resample draws seeds, then groups; the groups are the same under all seeds that were drawn. The interval
    therefore includes the variation between seeds. With two or three seeds it still underestimates it.

    Args:
        sides: (reference, other) for each seed, all on the same items.
        resamples: the number of bootstrap resamples.
        seed: the seed of the bootstrap.
        confidence: of the two-sided interval.

    Raises:
        DataError: see `paired`; or the seeds have different items.
    """
    pairs, groups = aligned(sides)
    references = np.array([[item.score for item in before] for before, _ in pairs])
    others = np.array([[item.score for item in after] for _, after in pairs])
    sizes = np.bincount(groups)
    gains = np.array([np.bincount(groups, difference) for difference in others - references])
    low, high = np.quantile(
        _bootstrap_means(gains, sizes, resamples, seed), [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    by_group = gains.sum(axis=0)
    return Paired(
        difference=float(by_group.sum() / references.size),
        low=float(low),
        high=float(high),
        p_mcnemar=_mcnemar(references, others),
        reference=float(references.mean()),
        other=float(others.mean()),
        items=references.size,
        groups=len(sizes),
        lost=int((by_group < -_TOLERANCE).sum()),
        changed=int((np.abs(by_group) > _TOLERANCE).sum()),
    )


def aligned(sides: Sides) -> tuple[list[tuple[list[Item], list[Item]]], np.ndarray]:
    """Return the items of all sides in one order, and the number of each item's group, (items,).

    Raises:
        DataError: see `paired_by_seed`.
    """
    keyed = [(_by_key(reference), _by_key(other)) for reference, other in sides]
    first = keyed[0][0]
    for before, after in keyed:
        _check_same_items(first, before)
        _check_same_items(before, after)
    pairs = [([before[key] for key in first], [after[key] for key in first]) for before, after in keyed]
    return pairs, _group_numbers(list(first.values()))


def exact_mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Args:
        lost: items that only the reference has right.
        gained: items that only the other system has right.
    """
    changed = lost + gained
    return float(binomtest(lost, changed, 0.5).pvalue) if changed else 1.0


def exact_loss_bound(lost: int, groups: int, confidence: float) -> float:
    """Return the upper end of the exact binomial (Clopper–Pearson) interval of the share of lost groups."""
    return float(binomtest(lost, groups).proportion_ci(confidence, method="exact").high)


def widened(comparison: Paired, confidence: float = 0.95) -> Paired:
    """Widen the interval of a comparison where the bootstrap is too narrow.

    If fewer than `FEW_CHANGES` groups changed, the interval covers at least the exact bounds of the shares of
    groups that lose and gain. Every changed group counts as lost or gained as a whole.
    """
    if comparison.changed >= FEW_CHANGES:
        return comparison
    loss, gain = (
        exact_loss_bound(count, comparison.groups, confidence)
        for count in (comparison.lost, comparison.changed - comparison.lost)
    )
    return replace(comparison, low=min(comparison.low, -loss), high=max(comparison.high, gain))


def detectable(comparison: Paired, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return the smallest true difference that data like these would show with a probability of ``power``.

    To show it, the interval must exclude 0. The standard error is taken from the width of the interval, whose
    ``confidence`` it had; it is too large where the interval was widened.
    """
    beyond = norm.ppf((1 + confidence) / 2)
    return float((comparison.high - comparison.low) / 2 * (1 + norm.ppf(power) / beyond))


def _by_key(items: Sequence[Item]) -> dict[tuple[str, str], Item]:
    keyed = {item.key: item for item in items}
    if len(keyed) < len(items):
        raise DataError(
            f"{len(items) - len(keyed)} of {len(items)} items of {items[0].system!r} are duplicates: "
            "a system may have only one item for each dataset and index"
        )
    return keyed


def _check_same_items(
    reference: Mapping[tuple[str, str], Item], other: Mapping[tuple[str, str], Item]
) -> None:
    missing, extra = reference.keys() - other.keys(), other.keys() - reference.keys()
    if missing or extra:
        dataset, index = min(missing | extra)
        raise DataError(
            f"the systems have different items: {len(missing)} of the reference's {len(reference)} items are "
            f"missing on the other side, and {len(extra)} of the other's {len(other)} on the reference's "
            f"(for example {dataset} {index}); score both on the same datasets"
        )
    if not reference:
        raise DataError("there are no items to compare")
    differing = [item for key, item in reference.items() if _context(item) != _context(other[key])]
    if differing:
        example = differing[0]
        raise DataError(
            f"{len(differing)} of {len(reference)} items have another image or category on the other side "
            f"(for example {example.dataset} {example.index}: {_context(example)} and "
            f"{_context(other[example.key])}); score both on the same tables"
        )


def _context(item: Item) -> tuple[str, str]:
    return item.group, item.category


def _group_numbers(items: Sequence[Item]) -> np.ndarray:
    names = [(item.dataset, item.group) for item in items]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([numbers[name] for name in names])


def _bootstrap_means(gains: np.ndarray, sizes: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the mean difference of each resample: seeds and groups, drawn with replacement.

    Args:
        gains: the summed differences of each group under each seed, (seeds, groups).
        sizes: the number of items in each group, (groups,).
        resamples: the number of resamples.
        seed: the seed of the draws.
    """
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        mean_gains = gains[rng.integers(0, len(gains), len(gains))].mean(axis=0)
        draw = rng.integers(0, len(sizes), len(sizes))
        means.append(mean_gains[draw].sum() / sizes[draw].sum())
    return np.array(means)


def _mcnemar(references: np.ndarray, others: np.ndarray) -> float | None:
    if not np.isin([references, others], (0.0, 1.0)).all():
        return None
    return exact_mcnemar(int((others < references).sum()), int((others > references).sum()))
