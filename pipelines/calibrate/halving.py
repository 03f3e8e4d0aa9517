"""Successive halving over SkipConfigs: which candidates survive a rung, and the order of verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pipelines.evaluation.gate import Budget, Verdict
from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import paired, widened
from skipvision.config import SkipConfig

_DEVIATIONS = 2.0
"""The approximate number of standard deviations in half an interval; it only affects the ranking."""


@dataclass(frozen=True)
class Candidate:
    """A SkipConfig of the search space.

    Attributes:
        name: a digest of its values.
        skip: the SkipConfig.
        costs: ratios to full tokens, by name.
    """

    name: str
    skip: SkipConfig
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Standing:
    """A candidate after a rung: its items so far, and the verdict on them against full tokens."""

    candidate: Candidate
    items: Sequence[Item]
    verdict: Verdict

    @property
    def chance(self) -> float:
        """The approximate probability that the candidate is within the budget."""
        deviation = (self.difference - self.verdict.worst) / _DEVIATIONS
        return 1 - NormalDist(self.difference, max(deviation, 1e-9)).cdf(-self.verdict.budget)

    @property
    def difference(self) -> float:
        """The accuracy minus that of full tokens."""
        return self.verdict.found.difference


def cheapest_within(
    standings: Sequence[Standing], cost: str, keep: int
) -> tuple[list[Standing], dict[str, str]]:
    """Keep the candidates that may be the cheapest within the budget.

    A candidate whose whole interval is over the budget is dropped. The others are ranked by their expected
    saving: what they save, times the chance that they are within the budget. A safe candidate therefore stays
    together with riskier ones, some of which look good by chance.

    Returns:
        The candidates kept, and by name the reason why each of the others was dropped.
    """
    out = {
        standing.candidate.name: "drop certainly over the budget"
        for standing in standings
        if standing.verdict.best < -standing.verdict.budget
    }
    ranked = sorted(
        (standing for standing in standings if standing.candidate.name not in out),
        key=lambda standing: -(1 - standing.candidate.costs[cost]) * standing.chance,
    )
    out |= {standing.candidate.name: "others have a higher expected saving" for standing in ranked[keep:]}
    return ranked[:keep], out


def most_accurate(
    standings: Sequence[Standing], keep: int, budget: Budget
) -> tuple[list[Standing], dict[str, str]]:
    """Keep the candidates that may be the most accurate.

    Returns:
        The candidates kept, and by name the reason why each of the others was dropped.
    """
    ranked = sorted(standings, key=lambda standing: -standing.difference)
    out: dict[str, str] = {}
    for standing in ranked[1:]:
        against_best = paired(ranked[0].items, standing.items, seed=budget.seed, confidence=budget.confidence)
        if widened(against_best, budget.confidence).high < 0:
            out[standing.candidate.name] = "certainly less accurate than another"
    rest = [standing for standing in ranked if standing.candidate.name not in out]
    out |= {standing.candidate.name: "others look better" for standing in rest[keep:]}
    return rest[:keep], out


def in_order_of_safety(standings: Sequence[Standing]) -> list[Standing]:
    """Sort the finalists for verification, the safest first.

    The order is fixed before the held-out answers are known, and verification stops at the first failure.
    All tests together therefore err no more often than a single one.
    """
    return sorted(standings, key=lambda standing: -standing.verdict.worst)


def rung_sizes(groups: int, rungs: int, factor: int) -> list[int]:
    """Return the number of groups that are evaluated by the end of each rung: at least one, finally all."""
    return [max(1, groups // factor ** (rungs - 1 - rung)) for rung in range(rungs)]
