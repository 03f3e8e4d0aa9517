"""Measures besides the score: a number of each answer, averaged and compared as scores are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelines.evaluation.items import OVERALL, Item, categories
from pipelines.evaluation.paired import Difference, Sides, paired_by_seed, widened

Gold = Mapping[tuple[str, str], str]
"""The gold answers by dataset and index of the item."""


@dataclass(frozen=True)
class Measure:
    """A number of each answer.

    Attributes:
        name: its name in results.
        title: its name in tables.
        value: computes the number, 0 or more; None = the measure does not apply to the item.
        part: the slice of the items to which it applies.
        percent: whether the number is a fraction that tables show in percent.
    """

    name: str
    title: str
    value: Callable[[Item], float | None]
    part: str = OVERALL
    percent: bool = True


def gold_of(item: Item, gold: Gold, part: str) -> str | None:
    """Return the gold answer of an item, or None if the item is not of a slice."""
    if part != OVERALL and part not in categories(item.category):
        return None
    return gold[item.key]


def mean_of(measure: Measure, items: Sequence[Item]) -> float | None:
    """Return the mean over the items to which a measure applies; None if there are none."""
    values = [value for item in items if (value := measure.value(item)) is not None]
    return math.fsum(values) / len(values) if values else None


def compare_measure(
    measure: Measure, sides: Sides, *, resamples: int = 2000, confidence: float = 0.95
) -> Difference | None:
    """Compare a measure of two systems, under one or several seeds, on the items to which it applies.

    Returns:
        The difference with its interval, as of `paired_by_seed` and `widened`; None if it applies to no item.

    Raises:
        DataError: see `paired_by_seed`.
    """
    valued = [[_valued(measure, items) for items in side] for side in sides]
    both = set.intersection(*({item.key for item in items} for side in valued for items in side))
    if not both:
        return None
    kept = [[[item for item in items if item.key in both] for items in side] for side in valued]
    # The bounds for few changed groups hold for numbers up to 1.
    largest = max(1.0, *(item.score for side in kept for items in side for item in items))
    found = paired_by_seed(
        [(_divided(before, largest), _divided(after, largest)) for before, after in kept],
        resamples=resamples,
        confidence=confidence,
    )
    return widened(found, confidence).numbers(largest)


def _valued(measure: Measure, items: Sequence[Item]) -> list[Item]:
    values = ((item, measure.value(item)) for item in items)
    return [replace(item, score=value) for item, value in values if value is not None]


def _divided(items: Sequence[Item], by: float) -> list[Item]:
    return [replace(item, score=item.score / by) for item in items]
