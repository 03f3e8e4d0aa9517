"""The stages on Ray: readers open and prepare images, engines generate captions.

A reader takes a whole shard and yields blocks of a few rows. An engine works on several blocks of any shards
at a time, so that it stays full while the last rows of a block are generated. A reader task that is repeated
yields the same blocks.
"""

from __future__ import annotations

import hashlib
import math
import os
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
from PIL import Image

from pipelines.caption.attempts import Attempts
from pipelines.caption.config import CaptionConfig
from pipelines.caption.manifest import Manifest
from pipelines.caption.rows import Caption, CaptionRow, Problem
from pipelines.caption.stream import packed, streamed, unpacked
from pipelines.cluster.cpus import usable_cpus
from pipelines.data.chat import chat_messages
from pipelines.data.images import ImageError
from pipelines.data.special_tokens import SpecialTokens
from pipelines.engines.backend import SharedEngine, open_engine
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from pipelines.engines.templates import TemplateProcess
from pipelines.engines.thread import Outcome
from pipelines.evaluation.answering import log_probability
from pipelines.shared.console import say
from pipelines.shared.files import StorageError, storage_errors
from skipvision.engine import Completion, Request, Sampling, Statistics, prepare
from skipvision.errors import InputError, SkipVisionError

BLOCKS_AT_ONCE = 12
_ROWS_AT_ONCE = 3
"""Rows waiting in an engine, as a multiple of the captions that it generates at once."""


@dataclass(frozen=True)
class Assignment:
    """The work of readers and engines. Paths are absolute."""

    config: CaptionConfig
    model: EngineModel
    manifest: Path
    attempts: Attempts

    @property
    def block_rows(self) -> int:
        """Number of rows in a block."""
        return math.ceil(_ROWS_AT_ONCE * self.config.engine.max_sequences / BLOCKS_AT_ONCE)


@dataclass(frozen=True)
class PreparedRow:
    """A prepared row, ``number`` of its shard: the engine's input, or a problem.

    The native engine takes the model's inputs in the safetensors format; vLLM takes the rendered prompt with
    its images, and prepares them itself.
    """

    number: int
    key: str
    inputs: bytes = b""
    prompt: str = ""
    images: tuple[Image.Image, ...] = ()
    problem: Problem | None = None

    def request(self, sampling: Sampling) -> Request:
        """Return the engine's request for this row, which has no problem."""
        if self.inputs:
            return Request(inputs=safetensors.torch.load(self.inputs), sampling=sampling)
        return Request(self.prompt, self.images, sampling=sampling)


@dataclass(frozen=True)
class Block:
    """Some prepared rows of a shard."""

    shard: int
    rows: Sequence[PreparedRow]


@dataclass(frozen=True)
class CaptionedBlock:
    """The captions of a block by row number in the shard, and the statistics of their engine."""

    shard: int
    captions: Mapping[int, Caption]
    engine: str
    statistics: Statistics


def captions(
    work: Assignment, shards: Sequence[int], resources: Mapping[str, float]
) -> Iterator[CaptionedBlock]:
    """Caption all rows of the shards and yield each block when it is finished. Ray must run.

    Raises:
        SkipVisionError: an engine could not start.
        ray.exceptions.RayError: a bug.
    """
    actor, scaling = (CaptionActor, work), work.config.scaling
    return streamed(shards, partial(read_shard, work), actor, scaling, resources, BLOCKS_AT_ONCE)


# --------------------------------------------------------------------------------------------- reading


def read_shard(work: Assignment, batch: pa.Table) -> Iterator[pa.Table]:
    """Yield the blocks of one shard with the model's inputs; or the error if the manifest cannot be read."""
    torch.set_num_threads(1)
    processor, template = _processor(work.model.base)
    shard = batch["shard"][0].as_py()
    try:
        with storage_errors(work.manifest, "read"):
            rows = enumerate(Manifest(work.manifest).shard(shard, work.config.input.max_pixels))
    except StorageError as error:  # raised here, it would reach the job as text
        yield packed(error)
        return
    rendered_only = work.config.engine.backend == "vllm"
    prepared = _few_at_once(
        lambda row: prepare_row(processor, row[0], row[1], template, rendered_only=rendered_only),
        rows,
        work.config.scaling.threads_per_reader,
    )
    while block := list(islice(prepared, work.block_rows)):
        yield packed(Block(shard, block))


@cache
def _processor(path: str) -> tuple[Any, TemplateProcess]:
    processor = load_processor(path)
    return processor, TemplateProcess(processor)


def _few_at_once(function: Any, values: Iterable[Any], threads: int) -> Iterator[Any]:
    """Like `map` in several threads, with max ``threads`` results waiting to be taken."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Any]] = deque()
        for value in values:
            if len(running) == threads:
                yield running.popleft().result()
            running.append(pool.submit(function, value))
        while running:
            yield running.popleft().result()


def prepare_row(
    processor: Any,
    number: int,
    row: CaptionRow,
    template: TemplateProcess | None = None,
    *,
    rendered_only: bool = False,
) -> PreparedRow:
    """Open a row's images and prepare the model's inputs. An error becomes the row's problem.

    With ``rendered_only`` the engine prepares the inputs from the rendered prompt and the images. A chat
    template that does not end would stop the job, so readers render it in a ``template`` process.
    """
    if row.problem is not None:
        return PreparedRow(number, row.key, problem=row.problem)
    messages = chat_messages(row.messages, processor)
    try:
        images = [image.open() for image in row.images]
        text = template.render(messages) if template is not None and template.exists else None
        if rendered_only and text is not None:
            return PreparedRow(number, row.key, prompt=text, images=tuple(images))
        inputs = prepare(processor, Request(messages, images), text).inputs or {}
    except ImageError as error:
        return PreparedRow(number, row.key, problem=Problem(error.kind, str(error)))
    except InputError as error:
        return PreparedRow(number, row.key, problem=Problem("prompt", str(error)))
    tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return PreparedRow(number, row.key, safetensors.torch.save(tensors))


# ------------------------------------------------------------------------------------------ generating


def _end_process(error: BaseException) -> None:
    """End this actor, so that Ray starts another: its engine ran in processes that have died."""
    say(f"the engine has died: {error}")
    os._exit(1)


class CaptionActor:
    """An engine in its own process. It captions several blocks at a time, each in a thread."""

    def __init__(self, work: Assignment) -> None:
        import ray

        given = ray.get_runtime_context().get_assigned_resources()
        torch.set_num_threads(max(1, min(math.ceil(given.get("CPU", 1)), usable_cpus())))
        device = torch.device("cuda" if given.get("GPU", 0) else "cpu")
        self.work = work
        self.name = str(ray.get_runtime_context().get_actor_id())
        self.alone = threading.Lock()
        self.engine: SharedEngine | SkipVisionError
        try:
            self.engine = open_engine(work.model, work.config.engine, device, _end_process)
            self.engine.wait_until_ready()
            self.special = SpecialTokens(load_processor(work.model.base))
        except SkipVisionError as error:  # raised here, it would reach the job as text
            self.engine = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        engine = self.engine
        if isinstance(engine, SkipVisionError):
            return packed(engine)
        (block,) = unpacked(batch)
        try:
            return packed(self._captioned(engine, block))
        except StorageError as error:  # raised here, it would reach the job as text
            return packed(error)

    def _captioned(self, engine: SharedEngine, block: Block) -> CaptionedBlock:
        piece = f"{block.shard}-{block.rows[0].number}"
        if self.work.attempts.begin(piece) == 0:
            captions = self._answer(engine, block.rows)
        else:
            # An engine died while it worked on this block and others. One row at a time shows which row is at
            # fault.
            captions = {}
            for row in block.rows:
                with self.alone:
                    captions |= self._answer_alone(engine, f"{piece}-{row.number}", row)
        self.work.attempts.end(piece)
        return CaptionedBlock(block.shard, captions, self.name, engine.statistics())

    def _answer(self, engine: SharedEngine, rows: Sequence[PreparedRow]) -> dict[int, Caption]:
        sound = [row for row in rows if row.problem is None]
        requests = [row.request(self._sampling(row.key)) for row in sound]
        outcomes = dict(zip((row.number for row in sound), engine.answer(requests), strict=True))
        return {row.number: self._caption(row, outcomes.get(row.number)) for row in rows}

    def _answer_alone(self, engine: SharedEngine, piece: str, row: PreparedRow) -> dict[int, Caption]:
        """Caption a row without another suspect row; after too many deaths of engines it is an error row."""
        deaths = self.work.attempts.begin(piece)
        if deaths >= self.work.config.scaling.max_failures:
            problem = Problem("generation", f"engines died {deaths} times while they captioned this row")
            row = replace(row, problem=row.problem or problem)
        captions = self._answer(engine, [row])
        self.work.attempts.end(piece)
        return captions

    def _sampling(self, key: str) -> Sampling:
        """Return the sampling with a seed for the row, so that its caption is the same in every attempt."""
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
            text=self.special.unescape(outcome.text).strip(),
            finish_reason=outcome.choices[0].finish_reason,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            visual_tokens=usage.visual_total,
            visual_tokens_retained=usage.visual_retained,
            visual_tokens_skipped=usage.visual_skipped,
            visual_tokens_cached=usage.visual_cached,
            seconds=round(timing.total - timing.queued, 4),
            log_probability=log_probability(outcome),
            model=model,
            adapter=adapter,
        )
