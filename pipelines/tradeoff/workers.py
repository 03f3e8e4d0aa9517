"""Ray tasks of a trade-off: answer the test rows at one point, and time the points of one adapter.

Both run `skipvision.Engine` as the endpoint does: the adapter is not merged, and weights and arithmetic have
the dtype that serving chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import skipvision as sv
from pipelines.data.rows import TrainingRow
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import usable_device
from pipelines.engines.model import EngineModel, load_engine
from pipelines.evaluation.answering import answer_rows, request_for, seconds_of
from pipelines.evaluation.exact_match import exact_items
from pipelines.evaluation.items import Item
from pipelines.shared.sections import EngineSection
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.points import Point, skip_vision_shape
from skipvision.engine import Engine, Sampling


def score(point: Point, seed: int, config: TradeoffConfig, rows: Sequence[TrainingRow]) -> list[Item]:
    """Answer every row at a point under one seed; an exact match scores 1."""
    engine = _engine_for(point, seed, config)
    skip = point.under(seed) or sv.SkipConfig.full()
    answers = answer_rows(engine, rows, skip=skip, max_new_tokens=config.max_new_tokens)
    return exact_items(rows, answers, point.method)


def first_token_seconds(
    some: Sequence[Point], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> list[list[float]]:
    """Return the seconds to the first token at each point of one adapter, one list over rounds per point.

    A round answers one row at every point in turn, so the row and other load on the machine affect all points
    of a round alike: compare times within a round. Each request runs alone in an idle engine. The clock runs
    from its submission to its first token, so it covers the vision tower, the plan, the prefill and the
    choice of the token, but not the rendering, tokenizing and image preprocessing before. The first round is
    a warm-up and is dropped.
    """
    engine = _engine_for(some[0], 0, config)
    seconds: list[list[float]] = [[] for _ in some]
    for number in range(config.latency_rounds + 1):
        row = rows[number % len(rows)]
        request = request_for(row.messages[:-1], row.images, engine.processor, Sampling(max_new_tokens=1))
        request = engine.prepare(request)
        for point, own in zip(some, seconds, strict=True):
            own.append(seconds_of(engine, replace(request, skip=point.skip or "full")))
    return [own[1:] for own in seconds]


def _engine_for(point: Point, seed: int, config: TradeoffConfig) -> Engine:
    summary_tokens = skip_vision_shape(config.adapters[point.adapter]).summary_tokens
    settings = EngineSection(max_sequences=config.batch_size, kv_budget_bytes=config.kv_budget_bytes)
    return _engine(config.model, point.paths[seed], summary_tokens, settings)


@lru_cache(maxsize=1)
def _engine(
    base: BaseModelSection, adapter: str | None, summary_tokens: int, settings: EngineSection
) -> Engine:
    """Load an engine and keep it for the next point of this process.

    A request may use no summary tokens or the engine's number, so the engine has the number of Skip-Vision.
    """
    skip = sv.SkipConfig.full().model_copy(update={"summary_tokens": summary_tokens})
    model = EngineModel.of(base, None if adapter is None else Path(adapter), skip)
    return load_engine(model, settings, usable_device())
