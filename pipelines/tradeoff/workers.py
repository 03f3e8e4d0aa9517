"""Ray tasks of a trade-off: answer the test rows at one point, and time the points of one adapter.

Both run `skipvision.Engine` as the endpoint does: the adapter is not merged, and weights and arithmetic have
the dtype that serving chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from torch import nn

import skipvision as sv
from pipelines.data.rows import TrainingRow
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import usable_device
from pipelines.engines.model import EngineModel, load_engine
from pipelines.evaluation.answering import answer_rows, request_for
from pipelines.evaluation.exact_match import exact_items
from pipelines.evaluation.items import Item
from pipelines.evaluation.second_turn import second_turns
from pipelines.shared.sections import EngineSection
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.pixels import accept_smaller_images, with_side
from pipelines.tradeoff.points import Point, skip_vision_shape
from pipelines.tradeoff.timing import Seconds, Stopwatch
from skipvision.engine import Engine, Sampling, prepare
from skipvision.errors import ConfigError


def score(point: Point, seed: int, config: TradeoffConfig, rows: Sequence[TrainingRow]) -> list[Item]:
    """Answer every row at a point under one seed; an exact match scores 1."""
    engine, _ = _engine_for(point, seed, config)
    answers = answer_rows(
        engine,
        rows,
        skip=point.under(seed) or sv.SkipConfig.full(),
        max_new_tokens=config.max_new_tokens,
        processor=None if point.side is None else with_side(engine.processor, point.side),
    )
    return exact_items(rows, answers, point.method)


def score_second_turn(
    point: Point, seed: int, config: TradeoffConfig, rows: Sequence[TrainingRow], first: Sequence[Item]
) -> list[Item]:
    """Answer each row's question after another question about its image and the answer in ``first``."""
    return score(point, seed, config, second_turns(rows, {item.index: item.prediction for item in first}))


def measure_seconds(
    some: Sequence[Point], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> list[list[Seconds]]:
    """Return the times at each point of one adapter, one list over rounds per point.

    A round answers one row at every point in turn, so the row and other load on the machine affect all points
    of a round alike: compare times within a round. Each request runs alone in an idle engine. The clock runs
    from its submission, so it does not cover rendering, tokenizing and image preprocessing. The first round
    is a warm-up and is dropped.
    """
    engine, model = _engine_for(some[0], 0, config)
    stopwatch = Stopwatch(model)
    sides = dict.fromkeys(point.side for point in some)
    processors = {
        side: engine.processor if side is None else with_side(engine.processor, side) for side in sides
    }
    seconds: list[list[Seconds]] = [[] for _ in some]
    for number in range(config.latency_rounds + 1):
        row = rows[number % len(rows)]
        request = request_for(row.messages[:-1], row.images, engine.processor, Sampling())
        prepared = {side: prepare(processor, request) for side, processor in processors.items()}
        for point, own in zip(some, seconds, strict=True):
            own.append(stopwatch.measure(engine, replace(prepared[point.side], skip=point.skip or "full")))
    return [own[1:] for own in seconds]


def _engine_for(point: Point, seed: int, config: TradeoffConfig) -> tuple[Engine, nn.Module]:
    summary_tokens = skip_vision_shape(config.adapters[point.adapter]).summary_tokens
    settings = EngineSection(max_sequences=config.batch_size, kv_budget_bytes=config.kv_budget_bytes)
    return _engine(config.model, point.paths[seed], summary_tokens, settings, bool(config.pixel_fractions))


@lru_cache(maxsize=1)
def _engine(
    base: BaseModelSection, adapter: str | None, summary_tokens: int, settings: EngineSection, smaller: bool
) -> tuple[Engine, nn.Module]:
    """Load an engine and its model, and keep them for the next point of this process.

    ``smaller`` lets the model read smaller images, if its tower can. A request may use no summary tokens or
    the engine's number, so the engine has the number of Skip-Vision.
    """
    skip = sv.SkipConfig.full().model_copy(update={"summary_tokens": summary_tokens})
    model = EngineModel.of(base, None if adapter is None else Path(adapter), skip)
    loaded: list[nn.Module] = []
    engine = load_engine(model, settings, usable_device(), loaded.append)
    if smaller:
        with suppress(ConfigError):  # then no point has smaller images
            accept_smaller_images(loaded[0])
    return engine, loaded[0]
