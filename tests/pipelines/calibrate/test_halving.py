"""Which candidates survive a rung, on standings made by hand."""

from __future__ import annotations

import pytest

from pipelines.calibrate.halving import (
    Candidate,
    Standing,
    cheapest_within,
    in_order_of_safety,
    most_accurate,
    rung_sizes,
)
from pipelines.evaluation.gate import Budget, judge
from pipelines.evaluation.items import Item
from skipvision.config import SkipConfig

BUDGET = Budget(overall=0.05)


def standing(
    name: str, cost: float, *, lost: int, gained: int = 0, items: int = 200, wrong: int = 50
) -> Standing:
    """A system that loses the first ``lost`` items and gains the last ``gained`` of the wrong ones."""
    before = [float(number < items - wrong) for number in range(items)]
    after = [score and float(number >= lost) for number, score in enumerate(before)]
    after[items - gained :] = [1.0] * gained
    sides = [
        [Item("d", str(i), name, "", str(i), "", score) for i, score in enumerate(side)]
        for side in (before, after)
    ]
    verdict = judge(*sides, BUDGET)[0]
    return Standing(Candidate(name, SkipConfig(), {"flops": cost}), sides[1], verdict)


def names(standings: list[Standing]) -> list[str]:
    return [one.candidate.name for one in standings]


def test_candidates_surely_over_the_budget_are_dropped_and_the_rest_ranked_by_expected_saving():
    bad = standing("bad", 0.1, lost=60)
    doubtful = standing("doubtful", 0.2, lost=12, gained=0)
    cheap = standing("cheap", 0.3, lost=12, gained=12)
    safe = standing("safe", 0.5, lost=0, gained=20)
    dear = standing("dear", 0.95, lost=0, gained=20)
    kept, out = cheapest_within([bad, dear, safe, doubtful, cheap], "flops", 3)
    assert names(kept) == ["cheap", "safe", "doubtful"]
    assert out == {"bad": "drop certainly over the budget", "dear": "others have a higher expected saving"}
    assert cheapest_within([bad], "flops", 3)[0] == []
    assert names(in_order_of_safety([doubtful, cheap, safe])) == ["safe", "cheap", "doubtful"]


def test_without_a_limit_on_accuracy_the_most_accurate_survive():
    best, near, far = (standing(n, 0.5, lost=lost, gained=12) for n, lost in (("b", 0), ("n", 2), ("f", 40)))
    kept, out = most_accurate([far, near, best], 2, BUDGET)
    assert names(kept) == ["b", "n"]
    assert out == {"f": "certainly less accurate than another"}
    assert names(most_accurate([far, near, best], 1, BUDGET)[0]) == ["b"]


def test_three_images_are_too_few_to_drop_a_candidate():
    """The bootstrap interval of three lost images has no width."""
    best, lost = (standing(name, 0.5, lost=count, items=3, wrong=0) for name, count in (("b", 0), ("l", 3)))
    assert lost.verdict.found.high == -1
    assert names(cheapest_within([best, lost], "flops", 2)[0]) == ["b", "l"]
    assert names(most_accurate([best, lost], 2, BUDGET)[0]) == ["b", "l"]


@pytest.mark.parametrize(
    ("groups", "rungs", "factor", "sizes"),
    [(90, 3, 3, [10, 30, 90]), (5, 3, 3, [1, 1, 5]), (7, 1, 3, [7])],
)
def test_the_last_rung_uses_all_groups(groups, rungs, factor, sizes):
    assert rung_sizes(groups, rungs, factor) == sizes
