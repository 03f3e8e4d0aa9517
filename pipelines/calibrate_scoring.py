"""Processes that score: each holds an engine, and asks it questions under any SkipConfig."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipelines.caption_config import EngineSection
from pipelines.caption_model import CaptionModel, load_captioner
from pipelines.collate import ChatFormat, open_images
from pipelines.evaluate import normalised
from pipelines.items import Item
from pipelines.learner import load_processor
from pipelines.rows import TrainingRow
from skipvision.config import SkipConfig
from skipvision.engine import Request, Sampling
from skipvision.errors import SkipVisionError

DATASET = "calibration"
FULL = "full"
"""The system with full tokens."""


@dataclass(frozen=True)
class Task:
    """What a process is asked to do with some rows.

    Attributes:
        kind: give points to the answers, or measure the time to the first token.
        system: the label of the items.
        skip: None = full tokens.
        rows: the rows.
    """

    kind: Literal["score", "latency"]
    system: str
    skip: SkipConfig | None
    rows: Sequence[TrainingRow]


class Scorer:
    """One process' engine."""

    def __init__(self, model: CaptionModel, engine: EngineSection, max_new_tokens: int) -> None:
        self._engine = load_captioner(
            model, engine, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        self._chat = ChatFormat(load_processor(model.base))
        self._sampling = Sampling(max_new_tokens=max_new_tokens)

    def do(self, number: int, task: Task) -> tuple[int, list[Item] | float]:
        """The number again, with items for a score; for latency, with the ratio to full tokens."""
        return number, self._score(task) if task.kind == "score" else self._latency(task)

    def _score(self, task: Task) -> list[Item]:
        requests = (self._request(row, task.skip, number) for number, row in enumerate(task.rows))
        answers = {}
        for completion in self._engine.run(requests):
            if completion.error is not None:
                raise completion.error
            answers[completion.key] = completion.text
        return [item(task.system, row, answers[number].strip()) for number, row in enumerate(task.rows)]

    def _latency(self, task: Task) -> float:
        """Median seconds to the first token of a prepared request, over those with full tokens.

        Both take turns on the same rows, so that what else the machine does weighs on both.
        """
        one_token = Sampling(max_new_tokens=1)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number, row in enumerate([task.rows[0], *task.rows]):  # the first time is to warm up
            for skipping in (False, True):
                given = self._request(row, task.skip if skipping else None, number, one_token)
                request = self._engine.prepare(given)
                started = time.perf_counter()
                list(self._engine.run([request]))
                if number:
                    seconds[skipping].append(time.perf_counter() - started)
        return statistics.median(seconds[True]) / statistics.median(seconds[False])

    def _request(
        self, row: TrainingRow, skip: SkipConfig | None, key: int, sampling: Sampling | None = None
    ) -> Request:
        _, (images,) = open_images([row], None)
        prompt = self._chat.prompt(row.messages[:-1])
        return Request(prompt, images, sampling=sampling or self._sampling, skip=skip or "full", key=key)


def item(system: str, row: TrainingRow, answer: str) -> Item:
    """One point for exactly what was expected, but for case and white space."""
    right = normalised(answer) == normalised(row.messages[-1].text)
    return Item(DATASET, row.key, system, row.task, group_of(row), answer, float(right))


def group_of(row: TrainingRow) -> str:
    """Rows about one image are not independent."""
    return str(row.images[0]) if row.images else row.key


@contextmanager
def scorers(
    model: CaptionModel,
    engine: EngineSection,
    max_new_tokens: int,
    *,
    workers: int,
    resources: Mapping[str, float],
) -> Iterator[Callable[[Sequence[Task]], Iterator[tuple[Task, Any]]]]:
    """A function that has tasks done side by side and yields them with their results as they end.

    A process that dies is started again, and its task with it.
    """
    import ray
    from ray.util import ActorPool

    remote = ray.remote(Scorer).options(
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
        max_restarts=2,
        max_task_retries=2,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(resources["CPU"])))}},
    )
    actors = [remote.remote(model, engine, max_new_tokens) for _ in range(workers)]
    pool = ActorPool(actors)

    def have_done(tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        try:
            done = pool.map_unordered(lambda actor, one: actor.do.remote(*one), list(enumerate(tasks)))
            for number, result in done:
                yield tasks[number], result
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SkipVisionError):  # not Ray's words around it
                raise error.cause from None
            raise

    try:
        yield have_done
    finally:
        for actor in actors:
            ray.kill(actor)
