"""Results of a trade-off: each point's costs, accuracy, and differences to other points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PretrainedConfig

import skipvision as sv
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.measures import Gold
from pipelines.evaluation.paired import Difference, Paired, Sides, paired_by_seed, widened
from pipelines.tradeoff.config import FULL, SKIP_VISION, TradeoffConfig
from pipelines.tradeoff.pixels import Costs, ImageSizes
from pipelines.tradeoff.points import Point, SeededPoint
from pipelines.tradeoff.timing import Seconds
from skipvision.baselines import language_share


@dataclass(frozen=True)
class Cell:
    """A number, a difference with its interval, or a word, in a further table.

    ``percent`` says whether tables show them in percent.
    """

    value: float | None = None
    difference: Difference | None = None
    text: str = ""
    percent: bool = True


@dataclass(frozen=True)
class PointResult:
    """Costs and accuracy of one point. Costs are ratios to full tokens.

    Attributes:
        point: the point.
        language_flops: predicted prefill FLOPs without the vision tower.
        prefill_flops: predicted prefill FLOPs with the tower.
        kv_bytes: predicted bytes of the KV cache after prefill.
        latency: time to the first token: median, over rounds, of the ratio within a round; None if not
            measured.
        latency_quartiles: first and third quartile of the same ratio.
        first_token_seconds: first quartile, median and third quartile of the time itself.
        accuracy: share of exact matches, by task and overall.
        gap: difference to the reference, full tokens, by task and overall.
        by_seed: the overall difference under each seed.
        behind: Skip-Vision minus this point, overall, under the same adapter and budget; None for
            Skip-Vision itself and where no such point exists.
        parts: medians, over rounds, of the times in the tower, for selection and in the prefill, as ratios to
            the whole time to the first token of full tokens; and of the time of each further token, as ratio
            to theirs. None if not measured.
        evidence: further tables, by title and column; see `pipelines.tradeoff.evidence`.
    """

    point: Point
    language_flops: float
    prefill_flops: float
    kv_bytes: float
    latency: float | None
    latency_quartiles: tuple[float, float] | None
    first_token_seconds: tuple[float, float, float] | None
    accuracy: dict[str, float]
    gap: dict[str, Paired]
    by_seed: list[float]
    behind: Paired | None
    parts: tuple[float, ...] | None = None
    evidence: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """The inputs of all results.

    Attributes:
        config: settings of the job.
        model: config of the base model.
        text_tokens: mean number of prompt tokens that are not visual.
        items: scored answers of each point under each seed.
        seconds: times of each point, by round; empty if not measured.
        second_turns: scored answers to follow-up questions, of the points that have them.
        gold: the expected answers.
        resamples: the number of bootstrap resamples of an interval.
    """

    config: TradeoffConfig
    model: PretrainedConfig
    text_tokens: int
    items: Mapping[SeededPoint, Sequence[Item]]
    seconds: Mapping[Point, Sequence[Seconds]]
    second_turns: Mapping[SeededPoint, Sequence[Item]]
    gold: Gold
    resamples: int = 2000

    @cached_property
    def _sizes(self) -> ImageSizes:
        return ImageSizes(self.model, self.text_tokens)

    def full_tokens(self, adapter: str) -> Point:
        """Return the point of full tokens under an adapter."""
        return next(point for point, _ in self.items if (point.adapter, point.method) == (adapter, FULL))

    def result(self, point: Point) -> PointResult:
        """Compare a point with its reference and with Skip-Vision at the same budget."""
        costs = self._costs(point)
        sides = self.sides(point)
        gaps = self._gaps(point, sides)
        ratio = self.latency(point)
        first_token = [one.first_token for one in self.seconds.get(point, ())]
        return PointResult(
            point,
            language_flops=costs.language_flops,
            prefill_flops=costs.prefill_flops,
            kv_bytes=costs.kv_bytes,
            latency=ratio and ratio[1],
            latency_quartiles=ratio and (ratio[0], ratio[2]),
            first_token_seconds=_quartiles(first_token) if first_token else None,
            accuracy={task: gap.other for task, gap in gaps.items()},
            gap=gaps,
            by_seed=[share(after) - share(before) for before, after in sides],
            behind=self._behind_skip_vision(point),
            parts=self._parts(point),
        )

    def _costs(self, point: Point) -> Costs:
        if point.side is not None:
            return self._sizes.costs(point.side)
        cost = sv.predict_cost(self.model, point.skip, text_tokens=self.text_tokens)
        ratio = cost.ratio_to_full
        return Costs(language_share(cost), ratio.prefill_flops, ratio.kv_bytes)

    def reference(self, point: Point) -> Point:
        """Return the point of full tokens that a point is compared with."""
        return self.full_tokens(self.config.adapters[point.adapter].reference or point.adapter)

    def sides(self, point: Point, of: Mapping[SeededPoint, Sequence[Item]] | None = None) -> Sides:
        """Return (reference, point) under each seed; a reference with one seed serves all.

        ``of`` holds their items; None = their answers to the questions alone.
        """
        items, reference = self.items if of is None else of, self.reference(point)
        last = len(reference.paths) - 1
        return [(items[reference, min(seed, last)], items[point, seed]) for seed in range(len(point.paths))]

    def _gaps(self, point: Point, sides: Sides) -> dict[str, Paired]:
        gaps = {
            task: self.paired([(_of(task, before), _of(task, after)) for before, after in sides])
            for task in [*sorted({item.category for item in self.items[point, 0]} - {""}), OVERALL]
        }
        if point == self.reference(point):
            return gaps  # a point cannot differ from itself, however few its images
        return {task: widened(gap) for task, gap in gaps.items()}

    def latency(self, point: Point) -> tuple[float, float, float] | None:
        """Return quartiles of the time to the first token as ratio to full tokens; None if not measured."""
        if not self.seconds:
            return None
        own, full = self.seconds[point], self.seconds[self.full_tokens(point.adapter)]
        return _quartiles([one.first_token / all_.first_token for one, all_ in zip(own, full, strict=True)])

    def _parts(self, point: Point) -> tuple[float, ...] | None:
        if not self.seconds:
            return None
        own, full = self.seconds[point], self.seconds[self.full_tokens(point.adapter)]
        ratios = [
            (*(part / all_.first_token for part in one.parts[:-1]), one.decode / all_.decode)
            for one, all_ in zip(own, full, strict=True)
        ]
        return tuple(np.median(ratios, axis=0).tolist())

    def rival(self, point: Point) -> Sides | None:
        """Return (point, Skip-Vision at the same budget) under each seed; None without such a budget."""
        if point.budget is None or point.method == SKIP_VISION:
            return None
        same = (point.adapter, SKIP_VISION, point.budget)
        rival = next((one for one, _ in self.items if (one.adapter, one.method, one.budget) == same), None)
        if rival is None:
            return None
        return [(self.items[point, seed], self.items[rival, seed]) for seed in range(len(point.paths))]

    def _behind_skip_vision(self, point: Point) -> Paired | None:
        sides = self.rival(point)
        return None if sides is None else widened(self.paired(sides))

    def paired(self, sides: Sides) -> Paired:
        """Compare two points; see `paired_by_seed`."""
        return paired_by_seed(sides, resamples=self.resamples)


def share(items: Sequence[Item]) -> float:
    """Return the mean score of the items, a fraction."""
    return sum(item.score for item in items) / len(items)


def _of(task: str, items: Sequence[Item]) -> list[Item]:
    return [item for item in items if task in (OVERALL, item.category)]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return first, median, third
