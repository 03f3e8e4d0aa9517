"""The gate: whether a system is worse than a reference by more than a budget, for each slice of the items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipelines.evaluation.items import OVERALL, Item, categories
from pipelines.evaluation.paired import FEW_CHANGES, Paired, paired, widened
from pipelines.evaluation.tables import markdown_table
from skipvision.errors import ConfigError, DataError

POWER = 0.8
"""The probability to pass with the estimated number of items, if the observed difference is the true one."""

_OUTCOMES = {
    "within": "within",
    "worse": "**worse**",
    "undecided": "**undecided**",
    "unanswered": "**too many without an answer**",
}


class Budget(BaseModel):
    """The largest drops of the mean score that are accepted, as fractions: 0.01 is one point of accuracy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: float = Field(0.02, gt=0, le=1, description="largest drop over all items")
    slices: dict[str, float] = Field(
        {}, description="largest drops of slices: DATASET, CATEGORY or DATASET/CATEGORY: fraction"
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="confidence level of the two-sided interval whose lower end must stay within the budget",
    )
    max_errors: float = Field(
        0.02,
        ge=0,
        le=1,
        description="largest share of a slice's items without an answer, on either side; more is refused",
    )
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of an interval")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("slices")
    @classmethod
    def _check_slices(cls, value: dict[str, float]) -> dict[str, float]:
        for name, drop in value.items():
            if not 0 < drop <= 1:
                raise ValueError(f"{name}: {drop} is not a drop; use a fraction above 0, up to 1")
        if OVERALL in value:
            raise ValueError(f"{OVERALL!r} is not a slice: set budget.overall")
        return value

    @property
    def required(self) -> dict[str, float]:
        """Every slice with its largest drop, the slice of all items first."""
        return {OVERALL: self.overall, **self.slices}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one slice.

    Attributes:
        slice: its name.
        budget: the largest drop accepted.
        found: the paired comparison, without the items that have no answer on either side.
        worst: the difference that decides: the lower end of the interval or, with few changed groups, the
            exact binomial bound if that is lower.
        best: the upper end of the interval, or the exact bound if that is higher.
        outcome: "within" if ``worst`` stays within the budget; "worse" if the difference itself does not;
            "unanswered" if a side has more errors than the budget accepts: all items are then compared, and
            the numbers mean little; otherwise "undecided".
        needed: an estimate of the items that a decision needs, if the observed difference is the true one;
            None unless the slice is undecided.
        errors: the number of items without an answer: of the reference, of the candidate.
    """

    slice: str
    budget: float
    found: Paired
    worst: float
    best: float
    outcome: Literal["within", "worse", "undecided", "unanswered"]
    needed: int | None
    errors: tuple[int, int]


def judge(reference: Sequence[Item], candidate: Sequence[Item], budget: Budget) -> list[Verdict]:
    """Return a verdict for every slice of the budget.

    Raises:
        ConfigError: the items have no such slice.
        DataError: the items cannot be paired, or the reference has errors where the candidate has none.
    """
    _check_reference_errors(reference, candidate)
    return [_verdict(name, drop, reference, candidate, budget) for name, drop in budget.required.items()]


def slice_of(items: Sequence[Item], name: str) -> list[Item]:
    """Return the items of a dataset, a category or DATASET/CATEGORY; all of them for `OVERALL`."""
    if name == OVERALL:
        return list(items)
    return [item for item in items if name in _slices(item)]


def _slices(item: Item) -> Iterator[str]:
    yield item.dataset
    for category in categories(item.category):
        yield category
        yield f"{item.dataset}/{category}"


def table(verdicts: Sequence[Verdict], confidence: float) -> str:
    """Format the verdicts as Markdown: scores in percent, differences in points."""
    header = [
        "slice",
        "items",
        "errors",
        "groups",
        "reference",
        "candidate",
        f"difference [{100 * confidence:g} % interval]",
        "McNemar p",
        "worst",
        "budget",
        "verdict",
    ]
    return markdown_table(header, map(_cells, verdicts), left=(0, len(header) - 1)) + "\n"


def _cells(verdict: Verdict) -> list[str]:
    found = verdict.found
    p = found.p_mcnemar
    needed = f"; about {verdict.needed} items needed" if verdict.needed else ""
    return [
        verdict.slice,
        str(found.items),
        "{} / {}".format(*verdict.errors),
        str(found.groups),
        f"{100 * found.reference:.1f}",
        f"{100 * found.other:.1f}",
        f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]",
        "" if p is None else f"{p:.2g}",
        f"{100 * verdict.worst:+.1f}",
        f"{-100 * verdict.budget:+.1f}",
        f"{_OUTCOMES[verdict.outcome]}{needed}",
    ]


def _verdict(
    name: str, drop: float, reference: Sequence[Item], candidate: Sequence[Item], budget: Budget
) -> Verdict:
    before, after = slice_of(reference, name), slice_of(candidate, name)
    if not before and not after:
        known = sorted({known for item in reference for known in _slices(item) if "/" not in known})
        raise ConfigError(
            f"budget.slices: the items have no slice {name!r}; the slices are {', '.join(known)}"
        )
    failed = _failed(before), _failed(after)
    errors = len(failed[0]), len(failed[1])
    unanswered = max(errors) > budget.max_errors * len(before)
    if not unanswered:  # items that failed on both sides tell nothing about either
        both = failed[0] & failed[1]
        before, after = ([item for item in side if item.key not in both] for side in (before, after))
    found = paired(before, after, resamples=budget.resamples, seed=budget.seed, confidence=budget.confidence)
    wide = widened(found, budget.confidence)
    verdict = partial(Verdict, name, drop, found, wide.low, wide.high, errors=errors)
    if unanswered:
        return verdict("unanswered", None)
    if wide.low >= -drop:
        return verdict("within", None)
    if found.difference <= -drop:
        return verdict("worse", None)
    return verdict("undecided", _items_needed(found, drop, budget.confidence))


def _items_needed(found: Paired, drop: float, confidence: float) -> int:
    """Estimate the items that decide with probability `POWER`, if the observed difference is the true one."""
    tail = (1 - confidence) / 2
    z = NormalDist().inv_cdf(1 - tail)
    half_width = (found.difference - found.low) * (1 + NormalDist().inv_cdf(POWER) / z)
    groups = [
        found.groups * (half_width / (found.difference + drop)) ** 2,
        math.log(tail) / math.log1p(-min(drop, 1 - 1e-9)),  # the exact bound needs these even without a loss
    ]
    if 0 < found.changed < FEW_CHANGES:
        groups.append(found.groups * FEW_CHANGES / found.changed)
    return math.ceil(max(groups) * found.items / found.groups)


def _check_reference_errors(reference: Sequence[Item], candidate: Sequence[Item]) -> None:
    failed = _failed(candidate)
    unfair = [item for item in reference if item.error is not None and item.key not in failed]
    if unfair:
        first = unfair[0]
        raise DataError(
            f"{len(unfair)} items of the reference {first.system!r} have an error and would count as gains "
            f"(for example {first.dataset} {first.index}: {first.error}): score the reference again"
        )


def _failed(items: Sequence[Item]) -> set[tuple[str, str]]:
    return {item.key for item in items if item.error is not None}
