"""Results of a trade-off: each point's costs, accuracy, and differences to other points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

import skipvision as sv
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.paired import Paired, paired_by_seed, widened
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.points import FULL, SKIP_VISION, Point, SeededPoint
from skipvision.baselines import language_share


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


@dataclass(frozen=True)
class Measurements:
    """The inputs of all results.

    Attributes:
        config: settings of the job.
        model: config of the base model.
        text_tokens: mean number of prompt tokens that are not visual.
        items: scored answers of each point under each seed.
        seconds: seconds to the first token of each point, by round; empty if not measured.
    """

    config: TradeoffConfig
    model: PretrainedConfig
    text_tokens: int
    items: Mapping[SeededPoint, Sequence[Item]]
    seconds: Mapping[Point, Sequence[float]]

    def full_tokens(self, adapter: str) -> Point:
        """Return the point of full tokens under an adapter."""
        return next(point for point, _ in self.items if (point.adapter, point.method) == (adapter, FULL))

    def result(self, point: Point) -> PointResult:
        """Compare a point with its reference and with Skip-Vision at the same budget."""
        cost = sv.predict_cost(self.model, point.skip, text_tokens=self.text_tokens)
        sides = self._sides(point)
        gaps = self._gaps(point, sides)
        ratio = self._latency(point)
        return PointResult(
            point,
            language_flops=language_share(cost),
            prefill_flops=cost.ratio_to_full.prefill_flops,
            kv_bytes=cost.ratio_to_full.kv_bytes,
            latency=ratio and ratio[1],
            latency_quartiles=ratio and (ratio[0], ratio[2]),
            first_token_seconds=_quartiles(self.seconds[point]) if self.seconds else None,
            accuracy={task: gap.other for task, gap in gaps.items()},
            gap=gaps,
            by_seed=[share(after) - share(before) for before, after in sides],
            behind=self._behind_skip_vision(point),
        )

    def _reference(self, point: Point) -> Point:
        return self.full_tokens(self.config.adapters[point.adapter].reference or point.adapter)

    def _sides(self, point: Point) -> list[tuple[Sequence[Item], Sequence[Item]]]:
        """Return (reference, point) under each seed; a reference with one seed serves all."""
        reference = self._reference(point)
        last = len(reference.paths) - 1
        return [
            (self.items[reference, min(seed, last)], self.items[point, seed])
            for seed in range(len(point.paths))
        ]

    def _gaps(
        self, point: Point, sides: Sequence[tuple[Sequence[Item], Sequence[Item]]]
    ) -> dict[str, Paired]:
        gaps = {
            task: paired_by_seed([(_of(task, before), _of(task, after)) for before, after in sides])
            for task in [*sorted({item.category for item in self.items[point, 0]} - {""}), OVERALL]
        }
        if point == self._reference(point):
            return gaps  # a point cannot differ from itself, however few its images
        return {task: widened(gap) for task, gap in gaps.items()}

    def _latency(self, point: Point) -> tuple[float, float, float] | None:
        if not self.seconds:
            return None
        full = self.seconds[self.full_tokens(point.adapter)]
        return _quartiles([own / whole for own, whole in zip(self.seconds[point], full, strict=True)])

    def _behind_skip_vision(self, point: Point) -> Paired | None:
        if point.budget is None or point.method == SKIP_VISION:
            return None
        same = (point.adapter, SKIP_VISION, point.budget)
        rival = next((one for one, _ in self.items if (one.adapter, one.method, one.budget) == same), None)
        if rival is None:
            return None
        seeds = range(len(point.paths))
        return widened(paired_by_seed([(self.items[point, s], self.items[rival, s]) for s in seeds]))


def share(items: Sequence[Item]) -> float:
    """Return the mean score of the items, a fraction."""
    return sum(item.score for item in items) / len(items)


def _of(task: str, items: Sequence[Item]) -> list[Item]:
    return [item for item in items if task in (OVERALL, item.category)]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return first, median, third
