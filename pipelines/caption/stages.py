"""What runs on Ray: readers open and prepare images, engines write captions; blocks of rows go between.

A reader takes a whole shard and hands out blocks of a few rows; an engine has several blocks at a time,
from whichever shard, so that it stays full while the last rows of one block are being written. Which rows
are in a block does not depend on what happens: a task that is repeated gives the same blocks.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import safetensors.torch
import torch

from pipelines.caption.attempts import Attempts
from pipelines.caption.config import CaptionConfig
from pipelines.caption.manifest import Manifest
from pipelines.caption.rows import Caption, CaptionRow, Problem
from pipelines.cluster.cpus import usable_cpus
from pipelines.data.chat import content_parts
from pipelines.data.images import ImageError
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel, load_engine
from pipelines.engines.thread import EngineThread, Outcome
from skipvision.engine import Completion, Request, Sampling, Statistics, prepare
from skipvision.errors import InputError, SkipVisionError

_BLOCKS_AT_ONCE = 12
_ROWS_AT_ONCE = 3
"""An engine has rows for so many times as many captions as it can write at once."""


_MOST_TASKS = 1000
"""Above this a reader takes several shards, one after the other: Ray Data keeps a record of every task."""


@dataclass(frozen=True)
class Assignment:
    """What readers and engines are told. Paths are absolute."""

    config: CaptionConfig
    model: EngineModel
    manifest: Path
    attempts: Attempts

    @property
    def block_rows(self) -> int:
        """Rows that go from a reader to an engine together."""
        return math.ceil(_ROWS_AT_ONCE * self.config.engine.max_sequences / _BLOCKS_AT_ONCE)


@dataclass(frozen=True)
class PreparedRow:
    """Row ``number`` of its shard: the model's inputs in the safetensors format, or what is wrong."""

    number: int
    key: str
    inputs: bytes = b""
    problem: Problem | None = None


@dataclass(frozen=True)
class Block:
    """Some rows of a shard: `PreparedRow`s before an engine has seen them."""

    shard: int
    rows: Sequence[PreparedRow]


@dataclass(frozen=True)
class Written:
    """Captions by the number of their row in the shard, and how the engine that wrote them is doing."""

    shard: int
    captions: Mapping[int, Caption]
    engine: str
    statistics: Statistics


def captions(work: Assignment, shards: Sequence[int], resources: Mapping[str, float]) -> Iterator[Written]:
    """All rows of the shards, as they are written; needs a running Ray.

    Raises the error of ours that kept an engine from starting; a bug is a `ray.exceptions.RayError`.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    scaling = work.config.scaling
    items = [{"shard": shard} for shard in shards]
    rows = ray.data.from_items(items, override_num_blocks=min(len(shards), _MOST_TASKS))
    # Ray Data cuts and glues blocks by their size. Each of ours is one binary value, which it cannot cut,
    # and no two are smaller than this.
    rows.context.target_max_block_size = 1
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    prepared = rows.map_batches(
        partial(read_shard, work),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=scaling.cpus_per_reader,
        compute=ray.data.TaskPoolStrategy(size=min(scaling.readers, len(shards))),
    )
    written = prepared.map_batches(
        CaptionActor,
        fn_constructor_args=(work,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=scaling.workers,
            enable_true_multi_threading=True,
            max_concurrent_calls_per_actor=_BLOCKS_AT_ONCE,
            max_tasks_in_flight_per_actor=_BLOCKS_AT_ONCE + 2,
        ),
        num_cpus=resources["CPU"],
        num_gpus=resources["GPU"],
    )
    for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from _unpacked(batch)


def _packed(value: Block | Written | SkipVisionError) -> pa.Table:
    return pa.table({"value": pa.array([pickle.dumps(value)], pa.large_binary())})


def _unpacked(table: pa.Table) -> Iterator[Any]:
    """What `_packed` in another process of the same job has packed; an error is raised."""
    for packed in table["value"]:
        value = pickle.loads(packed.as_buffer())  # noqa: S301
        if isinstance(value, SkipVisionError):
            raise value
        yield value


# --------------------------------------------------------------------------------------------- reading


def read_shard(work: Assignment, batch: pa.Table) -> Iterator[pa.Table]:
    """The blocks of one shard, their images opened and everything the model needs prepared."""
    torch.set_num_threads(1)
    processor = _processor(work.model.base)
    shard = batch["shard"][0].as_py()
    rows = enumerate(Manifest(work.manifest).shard(shard, work.config.input.max_pixels))
    prepared = _few_at_once(
        lambda row: prepare_row(processor, *row), rows, work.config.scaling.threads_per_reader
    )
    while block := list(islice(prepared, work.block_rows)):
        yield _packed(Block(shard, block))


@cache
def _processor(path: str) -> Any:
    return load_processor(path)


def _few_at_once(function: Any, values: Iterable[Any], threads: int) -> Iterator[Any]:
    """Like `map`, in several threads; no more than ``threads`` results wait to be taken."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Any]] = deque()
        for value in values:
            if len(running) == threads:
                yield running.popleft().result()
            running.append(pool.submit(function, value))
        while running:
            yield running.popleft().result()


def prepare_row(processor: Any, number: int, row: CaptionRow) -> PreparedRow:
    """Open a row's images and make the model's inputs; whatever is wrong with them becomes a problem."""
    if row.problem is not None:
        return PreparedRow(number, row.key, problem=row.problem)
    messages = [{"role": m.role, "content": content_parts(m.text)} for m in row.messages]
    try:
        images = [image.open() for image in row.images]
        inputs = prepare(processor, Request(messages, images)).inputs or {}
    except ImageError as error:
        return PreparedRow(number, row.key, problem=Problem(error.kind, str(error)))
    except InputError as error:
        return PreparedRow(number, row.key, problem=Problem("prompt", str(error)))
    tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return PreparedRow(number, row.key, safetensors.torch.save(tensors))


# --------------------------------------------------------------------------------------------- writing


class CaptionActor:
    """An engine in a process of its own; several blocks at a time, each in a thread."""

    def __init__(self, work: Assignment) -> None:
        import ray

        given = ray.get_runtime_context().get_assigned_resources()
        torch.set_num_threads(max(1, min(math.ceil(given.get("CPU", 1)), usable_cpus())))
        device = torch.device("cuda" if given.get("GPU", 0) else "cpu")
        self.work = work
        self.name = ray.get_runtime_context().get_actor_id()
        self.alone = threading.Lock()
        self.engine: EngineThread | SkipVisionError
        try:
            self.engine = EngineThread(lambda: load_engine(work.model, work.config.engine, device))
            self.engine.wait_until_ready()
        except SkipVisionError as error:  # raised in another process, it would reach the job as text
            self.engine = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if isinstance(self.engine, SkipVisionError):
            return _packed(self.engine)
        (block,) = _unpacked(batch)
        piece = f"{block.shard}-{block.rows[0].number}"
        if self.work.attempts.begin(piece) == 0:
            made = self._answer(block.rows)
        else:
            # An engine died with this block in hand, and others. A row at a time shows over which.
            made = {}
            for row in block.rows:
                with self.alone:
                    made |= self._answer_alone(f"{piece}-{row.number}", row)
        self.work.attempts.end(piece)
        return _packed(Written(block.shard, made, self.name, self.engine.statistics()))

    def _answer(self, rows: Sequence[PreparedRow]) -> dict[int, Caption]:
        sound = [row for row in rows if row.problem is None]
        requests = [
            Request(inputs=safetensors.torch.load(row.inputs), sampling=self._sampling(row.key))
            for row in sound
        ]
        outcomes = dict(zip((row.number for row in sound), self.engine.answer(requests), strict=True))
        return {row.number: self._caption(row, outcomes.get(row.number)) for row in rows}

    def _answer_alone(self, piece: str, row: PreparedRow) -> dict[int, Caption]:
        """A row without another suspect beside it; an error row if engines have died over it too often."""
        deaths = self.work.attempts.begin(piece)
        if deaths >= self.work.config.scaling.max_failures:
            problem = Problem("generation", f"engines died {deaths} times while they were writing this row")
            row = replace(row, problem=row.problem or problem)
        made = self._answer([row])
        self.work.attempts.end(piece)
        return made

    def _sampling(self, key: str) -> Sampling:
        """A seed for each row: its caption does not depend on where and how often it is written."""
        sampling = self.work.config.sampling
        if sampling.seed is None or sampling.temperature == 0:
            return sampling
        digest = hashlib.blake2b(f"{sampling.seed} {key}".encode(), digest_size=8).digest()
        return sampling.model_copy(update={"seed": int.from_bytes(digest) >> 1})

    def _caption(self, row: PreparedRow, outcome: Outcome | None) -> Caption:
        model, adapter = self.work.model.label, self.work.model.adapter_label
        problem = row.problem
        if not isinstance(outcome, Completion):
            problem = problem or Problem("prompt", str(outcome))
        elif outcome.error is not None or not outcome.choices:
            problem = Problem("generation", f"{type(outcome.error).__name__}: {outcome.error}")
        if problem is not None or not isinstance(outcome, Completion):
            kind, reason = (problem.kind, problem.reason) if problem else (None, None)
            return Caption(row.key, model=model, adapter=adapter, error_kind=kind, error=reason)
        usage, timing = outcome.usage, outcome.timing
        return Caption(
            key=row.key,
            text=outcome.text.strip(),
            finish_reason=outcome.choices[0].finish_reason,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            visual_tokens=usage.visual_total,
            visual_tokens_retained=usage.visual_retained,
            visual_tokens_skipped=usage.visual_skipped,
            visual_tokens_cached=usage.visual_cached,
            seconds=round(timing.total - timing.queued, 4),
            model=model,
            adapter=adapter,
        )
