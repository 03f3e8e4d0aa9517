"""Differences of two systems: worked by hand, and against simulations with a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import exact_mcnemar, paired, paired_by_seed, widened
from skipvision.errors import DataError


def items(
    scores: list[float], *, per_group: int = 1, system: str = "one", dataset: str = "data"
) -> list[Item]:
    return [
        Item(dataset, str(number), system, "", str(number // per_group), "", float(score))
        for number, score in enumerate(scores)
    ]


def test_a_case_worked_by_hand():
    """Two of five lost, one gained, in groups of one."""
    found = paired(items([1, 1, 1, 0, 0]), items([0, 0, 1, 1, 0]))
    assert (found.reference, found.other) == (pytest.approx(0.6), pytest.approx(0.4))
    assert found.difference == pytest.approx(-0.2)
    assert (found.items, found.groups, found.lost, found.changed) == (5, 5, 2, 3)
    assert found.p_mcnemar == 1.0  # 2 against 1: as even as three can be
    assert found.low == pytest.approx(-0.8)
    assert found.high == pytest.approx(0.4)


def test_items_are_paired_by_name_and_not_by_place():
    one, other = items([1, 0, 1, 0]), items([1, 0, 1, 0], system="other")
    found = paired(one, other[::-1])
    assert (found.difference, found.low, found.high, found.changed) == (0, 0, 0, 0)
    assert paired(one + items([0], dataset="b"), other + items([1], dataset="b")).changed == 1


def test_fractions_of_points_have_an_interval_but_no_mcnemar():
    found = paired(items([0.3, 0.6, 0.9] * 4), items([0.3, 0.9, 1.0] * 4))
    assert found.difference == pytest.approx(0.4 / 3)
    assert found.low < found.difference < found.high
    assert found.p_mcnemar is None


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 0.0625),  # 2 · (1/2)^5
        (1, 9, 0.021484375),  # 2 · (1 + 10) / 2^10
        (10, 2, 0.03857421875),  # 2 · (1 + 12 + 66) / 2^12
        (6, 6, 1.0),
        (59, 6, 4.96465e-12),  # SciPy's binomtest
        (2000, 2000, 1.0),  # larger than a float can count
    ],
)
def test_mcnemar_is_the_exact_binomial_test(lost, gained, p):
    assert exact_mcnemar(lost, gained) == pytest.approx(p, rel=1e-3)


def test_the_interval_covers_the_truth_also_where_groups_are_alike():
    """A bootstrap of items, not of groups, covers it in three cases of four."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        drop = np.repeat(rng.random(60) < 0.3, 4)  # a picture is lost with all its questions
        gain = rng.random(240) < 0.1
        right = rng.random(240) < 0.7
        after = np.where(right, ~drop, gain)
        found = paired(items(list(right), per_group=4), items(list(after), per_group=4), resamples=300)
        covered.append(found.low <= 0.3 * 0.1 - 0.7 * 0.3 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_interval_knows_of_the_seeds():
    """Everything gained under one, nothing under the other: images alone would leave no doubt."""
    seeds = [(items([0] * 20), items([1] * 20)), (items([0] * 20), items([0] * 20))]
    found = paired_by_seed(seeds)
    assert (found.difference, found.low, found.high) == (0.5, 0, 1)
    assert (found.items, found.groups, found.changed) == (40, 20, 20)
    one, other = items([1, 0] * 20, per_group=4), items([1, 0, 0, 1] * 10, per_group=4)
    assert paired_by_seed([(one, other)] * 2).low == pytest.approx(paired(one, other).low, abs=0.05)
    with pytest.raises(DataError, match="not asked the same"):
        paired_by_seed([seeds[0], (one, other)])


@pytest.mark.parametrize(
    ("before", "after", "low", "high"),
    [
        ([1], [1], -0.975, 0.975),  # 1 − 0.025
        ([1] * 40, [1] * 40, -(1 - 0.025 ** (1 / 40)), 1 - 0.025 ** (1 / 40)),
        ([1] * 4, [0] * 4, -1, 1 - 0.025 ** (1 / 4)),
        ([0] * 4, [1] * 4, -(1 - 0.025 ** (1 / 4)), 1),
    ],
)
def test_few_changes_leave_the_exact_bounds_possible(before, after, low, high):
    found = widened(paired(items(before), items(after)), 0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_many_changes_leave_the_interval_as_it_is():
    one, other = items([1, 0] * 20), items([0, 1] * 20)
    assert widened(paired(one, other), 0.95) == paired(one, other)


def test_a_wider_confidence_is_a_wider_interval_and_a_seed_repeats_it():
    one, other = items([1, 0] * 20), items([1, 0, 0, 1] * 10)
    assert paired(one, other) == paired(one, other)
    wide, narrow = (paired(one, other, confidence=c) for c in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (items([1, 1, 1]), items([1]), "2 of the reference's 3 items are missing on the other side"),
        (items([1]), items([1], dataset="b"), r"1 of the other's 1 on the reference's \(b 0, for one\)"),
        (items([1, 1]) + items([1]), items([1, 1]), "1 of 3 items of 'one' are there again"),
        ([], [], "no items"),
        (
            items([1, 1]),
            items([1, 1], per_group=2),
            r"1 of 2 items are about another .* \(data 1: \('1', ''\)",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(one, other, says):
    with pytest.raises(DataError, match=says):
        paired(one, other)
