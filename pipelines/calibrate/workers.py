"""Worker processes of a calibration: each holds an engine and evaluates questions under any SkipConfig."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.calibrate.pool import RunTasks, actor_pool
from pipelines.engines.loading import usable_device
from pipelines.engines.model import EngineModel, load_engine
from pipelines.evaluation.answering import request_for, seconds_of
from pipelines.evaluation.items import Item
from pipelines.score.dataset import Dataset
from pipelines.score.in_process import score_dataset
from pipelines.shared.sections import EngineSection
from skipvision.config import SkipConfig
from skipvision.engine import Sampling
from skipvision.errors import DataError

FULL = "full"
"""The system with full tokens."""


@dataclass(frozen=True)
class Task:
    """A unit of work for one process.

    Attributes:
        kind: "score" = score the answers, "latency" = measure the time to the first token.
        system: the label of the items.
        skip: the SkipConfig, or "full" for full tokens.
        dataset: the questions.
    """

    kind: Literal["score", "latency"]
    system: str
    skip: SkipConfig | Literal["full"]
    dataset: Dataset


class Scorer:
    """The engine of one process."""

    def __init__(self, model: EngineModel, engine: EngineSection, max_new_tokens: int) -> None:
        self._engine = load_engine(model, engine, usable_device())
        self._max_new_tokens = max_new_tokens

    def do(self, number: int, task: Task) -> tuple[int, list[Item] | float]:
        """Return ``number`` with the items of a score task, or the ratio of a latency task."""
        return number, self._score(task) if task.kind == "score" else self._latency(task)

    def _score(self, task: Task) -> list[Item]:
        items = score_dataset(
            self._engine, task.dataset, task.skip, system=task.system, max_new_tokens=self._max_new_tokens
        ).items
        if all(item.error is not None for item in items):
            raise DataError(
                f"none of {len(items)} questions has an answer with {task.skip}: {items[0].error}"
            )
        return items

    def _latency(self, task: Task) -> float:
        """Return the median time to the first token of a prepared request, as a ratio to full tokens.

        The two SkipConfigs take turns on the same questions, so that other load of the machine affects both.
        """
        engine, one_token = self._engine, Sampling(max_new_tokens=1)
        questions = task.dataset.questions
        seconds: dict[SkipConfig | Literal["full"], list[float]] = {"full": [], task.skip: []}
        for number, question in enumerate([questions[0], *questions]):  # the first round is a warm-up
            for skip, taken in seconds.items():
                request = request_for(question.messages, question.images, engine.processor, one_token)
                one = seconds_of(engine, engine.prepare(replace(request, skip=skip)))
                if number:
                    taken.append(one)
        return statistics.median(seconds[task.skip]) / statistics.median(seconds["full"])


@contextmanager
def scorers(
    model: EngineModel,
    engine: EngineSection,
    max_new_tokens: int,
    *,
    workers: int,
    resources: Mapping[str, float],
) -> Iterator[RunTasks]:
    """Start workers with an engine each, and yield a function that runs `Task`s on them."""
    with actor_pool(Scorer, model, engine, max_new_tokens, workers=workers, resources=resources) as run_tasks:
        yield run_tasks
