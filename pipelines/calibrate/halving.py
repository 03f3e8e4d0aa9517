"""Successive halving over SkipConfigs: who stays after a rung, and in which order finalists are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pipelines.evaluation.gate import Budget, Verdict
from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import paired, widened
from skipvision.config import SkipConfig

_DEVIATIONS = 2.0
"""Standard deviations in half an interval, about; it only ranks."""


@dataclass(frozen=True)
class Candidate:
    """A SkipConfig of the search space.

    Attributes:
        name: a digest of its values.
        skip: the values.
        costs: ratios to full tokens, by name.
    """

    name: str
    skip: SkipConfig
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """A candidate after a rung: its answers so far, and what they say against full tokens."""

    candidate: Candidate
    items: Sequence[Item]
    verdict: Verdict

    @property
    def chance(self) -> float:
        """About how likely it is within the budget."""
        below = (self.difference - self.verdict.worst) / _DEVIATIONS
        return 1 - NormalDist(self.difference, max(below, 1e-9)).cdf(-self.verdict.budget)

    @property
    def difference(self) -> float:
        """Accuracy minus that of full tokens."""
        return self.verdict.found.difference


def cheapest_within(
    standings: Sequence[Standing], cost: str, keep: int
) -> tuple[list[Standing], dict[str, str]]:
    """Who may still turn out to be the cheapest within a drop of accuracy, and why the others may not.

    The interval throws out what is too bad. Of the rest those stay from which most is to be expected: what
    they save, times the chance that they are within. A safe one stays beside bold ones in this way, however
    good these look: of many some always do.
    """
    out = {
        one.candidate.name: "drop certainly over the budget"
        for one in standings
        if one.verdict.best < -one.verdict.budget
    }
    ranked = sorted(
        (one for one in standings if one.candidate.name not in out),
        key=lambda one: -(1 - one.candidate.costs[cost]) * one.chance,
    )
    out |= {one.candidate.name: "more is to be expected of others" for one in ranked[keep:]}
    return ranked[:keep], out


def most_accurate(
    standings: Sequence[Standing], keep: int, budget: Budget
) -> tuple[list[Standing], dict[str, str]]:
    """Who may still turn out to be the most accurate, and why the others may not."""
    ranked = sorted(standings, key=lambda one: -one.difference)
    out: dict[str, str] = {}
    for one in ranked[1:]:
        against_best = paired(ranked[0].items, one.items, seed=budget.seed, confidence=budget.confidence)
        if widened(against_best, budget.confidence).high < 0:
            out[one.candidate.name] = "certainly less accurate than another"
    rest = [one for one in ranked if one.candidate.name not in out]
    out |= {one.candidate.name: "others look better" for one in rest[keep:]}
    return rest[:keep], out


def in_order_of_safety(standings: Sequence[Standing]) -> list[Standing]:
    """The order in which finalists are verified, one after the other until one fails.

    It is fixed before the held-out answers are looked at, and nothing is tested behind a failure: so all
    tests together err no more often than a single one would.
    """
    return sorted(standings, key=lambda one: -one.verdict.worst)


def rung_sizes(groups: int, rungs: int, factor: int) -> list[int]:
    """How many groups of rows have been asked after each rung; at least one, all after the last."""
    return [max(1, groups // factor ** (rungs - 1 - rung)) for rung in range(rungs)]
