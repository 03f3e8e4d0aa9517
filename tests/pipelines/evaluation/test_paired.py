"""Differences of two systems: small cases by hand, and simulations with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import (
    detectable,
    exact_loss_bound,
    exact_mcnemar,
    paired,
    paired_by_seed,
    widened,
)
from skipvision.errors import DataError


def items(
    scores: list[float], *, per_group: int = 1, system: str = "one", dataset: str = "data"
) -> list[Item]:
    return [
        Item(dataset, str(number), system, "", str(number // per_group), "", float(score))
        for number, score in enumerate(scores)
    ]


def test_a_small_case_agrees_with_pen_and_paper():
    """Of five items, two are lost and one is gained; every item is a group."""
    found = paired(items([1, 1, 1, 0, 0]), items([0, 0, 1, 1, 0]))
    assert (found.reference, found.other) == (pytest.approx(0.6), pytest.approx(0.4))
    assert found.difference == pytest.approx(-0.2)
    assert (found.items, found.groups, found.lost, found.changed) == (5, 5, 2, 3)
    assert found.p_mcnemar == 1.0  # 2 against 1 is as even as three changes can be
    assert found.low == pytest.approx(-0.8)
    assert found.high == pytest.approx(0.4)


def test_items_are_paired_by_key_and_not_by_order():
    one, other = items([1, 0, 1, 0]), items([1, 0, 1, 0], system="other")
    found = paired(one, other[::-1])
    assert (found.difference, found.low, found.high, found.changed) == (0, 0, 0, 0)
    assert paired(one + items([0], dataset="b"), other + items([1], dataset="b")).changed == 1


def test_fractional_scores_have_an_interval_but_no_mcnemar_test():
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
        (59, 6, 2 * sum(math.comb(65, k) for k in range(7)) / 2**65),
        (2000, 2000, 1.0),  # 2^4000 is larger than a float
    ],
)
def test_mcnemar_is_the_exact_binomial_test(lost, gained, p):
    assert exact_mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("lost", "groups"), [(0, 40), (1, 7), (9, 183), (6, 1000)])
def test_the_bound_of_the_loss_solves_the_equation_of_clopper_and_pearson(lost, groups):
    """At the bound, as few losses as observed have a probability of exactly one tail."""
    bound = exact_loss_bound(lost, groups, 0.95)
    tail = sum(math.comb(groups, k) * bound**k * (1 - bound) ** (groups - k) for k in range(lost + 1))
    assert tail == pytest.approx(0.025, rel=1e-10)
    assert exact_loss_bound(groups, groups, 0.95) == 1


def test_the_interval_covers_the_truth_where_the_items_of_a_group_depend_on_each_other():
    """A bootstrap over items instead of groups covers the truth in only three cases of four."""
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        drop = np.repeat(rng.random(60) < 0.3, 4)  # an image is lost with all its questions
        gain = rng.random(240) < 0.1
        right = rng.random(240) < 0.7
        after = np.where(right, ~drop, gain)
        found = paired(items(list(right), per_group=4), items(list(after), per_group=4), resamples=300)
        covered.append(found.low <= 0.3 * 0.1 - 0.7 * 0.3 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.99


def test_the_interval_includes_the_variation_between_seeds():
    """One seed gains everything, the other nothing; a bootstrap over images alone has no width."""
    seeds = [(items([0] * 20), items([1] * 20)), (items([0] * 20), items([0] * 20))]
    found = paired_by_seed(seeds)
    assert (found.difference, found.low, found.high) == (0.5, 0, 1)
    assert (found.items, found.groups, found.changed) == (40, 20, 20)
    one, other = items([1, 0] * 20, per_group=4), items([1, 0, 0, 1] * 10, per_group=4)
    assert paired_by_seed([(one, other)] * 2).low == pytest.approx(paired(one, other).low, abs=0.05)
    with pytest.raises(DataError, match="the systems have different items"):
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
def test_few_changes_widen_the_interval_to_the_exact_bounds(before, after, low, high):
    found = widened(paired(items(before), items(after)), 0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_many_changes_do_not_widen_the_interval():
    one, other = items([1, 0] * 20), items([0, 1] * 20)
    assert widened(paired(one, other), 0.95) == paired(one, other)


def test_more_confidence_widens_the_interval_and_a_seed_repeats_it():
    one, other = items([1, 0] * 20), items([1, 0, 0, 1] * 10)
    assert paired(one, other) == paired(one, other)
    wide, narrow = (paired(one, other, confidence=c) for c in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (items([1, 1, 1]), items([1]), "2 of the reference's 3 items are missing on the other side"),
        (items([1]), items([1], dataset="b"), r"1 of the other's 1 on the reference's \(for example b 0\)"),
        (items([1, 1]) + items([1]), items([1, 1]), "1 of 3 items of 'one' are duplicates"),
        ([], [], "no items"),
        (
            items([1, 1]),
            items([1, 1], per_group=2),
            r"1 of 2 items have another image or category .*for example data 1: \('1', ''\)",
        ),
    ],
)
def test_unpaired_items_raise(one, other, message):
    with pytest.raises(DataError, match=message):
        paired(one, other)


def test_the_detectable_difference_is_shown_in_four_of_five_experiments():
    rng = np.random.default_rng(2)
    same, noise = np.full(240, 0.5), rng.normal(scale=0.1, size=240)
    smallest = detectable(paired(items(list(same)), items(list(same + noise)), resamples=1000))
    shown = []
    for _ in range(150):
        after = same + rng.normal(scale=0.1, size=240) + smallest
        shown.append(paired(items(list(same)), items(list(after)), resamples=200).low > 0)
    assert 0.7 <= np.mean(shown) <= 0.9
