"""What runs in each Ray Train worker: steps, checkpoints, evaluation, and the adapter at the end."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import transformers
from torch import distributed

import skipvision as sv
from pipelines.batches import LengthGroupedBatches, prefetched
from pipelines.collate import Batch, Collator
from pipelines.evaluate import accuracy_by_task, evaluate_exact_match, pick_rows
from pipelines.finetune_config import FinetuneConfig
from pipelines.learner import Learner, StepStats, arithmetic, load_base, load_processor, prepare
from pipelines.progress import Progress
from pipelines.rows import TrainingRow
from pipelines.tracking import Tracker
from skipvision.errors import DataError


@dataclass(frozen=True)
class Assignment:
    """What all workers of a run are given. Paths are absolute."""

    config: FinetuneConfig
    rows: Sequence[TrainingRow]
    lengths: Sequence[int]
    validation: Sequence[TrainingRow]
    steps: int
    adapter: Path
    tracking_uri: str
    run_id: str


def train_worker(work: Assignment, _: dict[str, Any]) -> dict[str, Any]:
    """The run from its last checkpoint to its end; returns what there is to say about it."""
    context = ray.train.get_context()
    torch.set_num_threads(_threads())
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        tracker = None
        if context.get_world_rank() == 0:
            tracker = Tracker(work.tracking_uri, work.run_id)
            stack.callback(tracker.close)
            if work.config.tracking.system_metrics_seconds:
                tracker.watch_system(work.config.tracking.system_metrics_seconds)
        worker = Worker(work, context.get_world_rank(), context.get_world_size(), tracker)
        result = worker.run()
        if tracker is not None:
            result["unrecorded_values"] = tracker.close()
        return result


class Worker:
    """One of ``workers`` processes that train together; ``rank`` 0 also reports and saves."""

    def __init__(self, work: Assignment, rank: int, workers: int, tracker: Tracker | None) -> None:
        self.work, self.config = work, work.config
        self.rank, self.workers, self.tracker = rank, workers, tracker
        device = ray.train.torch.get_device()
        compute = arithmetic(self.config.training.precision, device)
        self.processor = load_processor(self.config.model.path)
        model = prepare(load_base(self.config.model, compute, device), self.config)
        self.learner = Learner(model, self.config, device)
        # The prefetching thread's own tokenizer: fast tokenizers must not be shared between threads.
        self.collator = Collator(load_processor(self.config.model.path))
        self.progress = Progress(work.steps)

    def run(self) -> dict[str, Any]:
        done = self._restore()
        training, every = self.config.training, self.config.evaluation.every
        self._say(f"{'resuming behind' if done else 'starting before'} step {done}/{self.work.steps}")
        self.progress.start(done)
        for batches in self._batches(done):
            stats = self.learner.step(batches, done, self.work.steps)
            done += 1
            self._record(done, stats)
            if done % training.checkpoint_every == 0 or done == self.work.steps:
                self._checkpoint(done)
            if every and done % every == 0 and done < self.work.steps:
                self._evaluate(done)
            self.progress.start(done)
        if self.rank == 0:
            # Before the evaluation, which opens images that may have become unreadable.
            sv.save_adapter(self.learner.model, self.work.adapter)
        return {**self.progress.summary(), **self._evaluate(done)}

    # ------------------------------------------------------------------------------------- steps

    def _batches(self, first: int) -> Iterator[list[Batch]]:
        """This worker's share of every step from ``first`` on."""
        training = self.config.training
        order = LengthGroupedBatches(self.work.lengths, training.batch_size, self.config.seed)

        def share(step: int) -> list[Batch]:
            groups = order.share(step, self.rank, self.workers, training.micro_batch_size)
            batches = (self._collate([self.work.rows[i] for i in group]) for group in groups)
            return [batch for batch in batches if batch is not None]

        return prefetched(share, range(first, self.work.steps), training.prefetch)

    def _collate(self, rows: Sequence[TrainingRow]) -> Batch | None:
        """A batch; without rows whose images have become unreadable since they were checked, if they were."""
        try:
            return self.collator(rows)
        except DataError as error:
            if self.config.data.on_bad_row == "stop":
                raise
            print(f"a row is left out: {error}", flush=True)
        usable = [row for row in rows if all(map(_opens, row.images))]
        return self.collator(usable) if usable else None

    def _record(self, done: int, stats: StepStats) -> None:
        seconds = self.progress.finish(stats)
        if self.tracker is not None:
            values = {
                "loss": stats.loss,
                "learning_rate": stats.learning_rate,
                "grad_norm": stats.grad_norm,
                "step_seconds": seconds,
                "images_per_second": stats.images / seconds,
                "tokens_per_second": stats.tokens / seconds,
                "peak_memory_bytes": float(_peak_memory(self.learner.device)),
            }
            self.tracker.metrics(values, done)
        if done % self.config.training.log_every == 0 or done == self.work.steps:
            self._say(self.progress.line(done, stats))

    # ------------------------------------------------------------------------------- checkpoints

    def _restore(self) -> int:
        """The steps that are done, with weights and optimiser as they were then."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location=self.learner.device)
        self.learner.load_state(state)
        self.progress.step_seconds = state["step_seconds"]
        self.progress.last_loss = state["loss"]
        return int(state["step"])

    def _checkpoint(self, done: int) -> None:
        """Ray copies the folder to the storage and only then counts it as a checkpoint."""
        if self.rank:
            ray.train.report({"step": done})
            return
        if self.tracker is not None:
            self.tracker.flush()  # a run that resumes from here will not repeat these steps
        with tempfile.TemporaryDirectory() as folder:
            extra = {
                "step": done,
                "step_seconds": self.progress.step_seconds,
                "loss": self.progress.last_loss,
            }
            torch.save({**self.learner.state(), **extra}, Path(folder) / "state.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {"step": done, "loss": self.progress.last_loss},
                checkpoint=checkpoint,
                checkpoint_dir_name=f"checkpoint_{done:08d}",
            )

    # -------------------------------------------------------------------------------- evaluation

    def _evaluate(self, done: int) -> dict[str, Any]:
        """Validation loss and exact match after ``done`` steps, each worker taking its share of the rows."""
        settings, rows = self.config.evaluation, self.work.validation
        if not rows:
            return {}
        started = time.monotonic()
        ours = pick_rows(rows, settings.loss_rows)[self.rank :: self.workers]
        groups = [ours[i : i + settings.batch_size] for i in range(0, len(ours), settings.batch_size)]
        collate = Collator(self.processor)
        results: dict[str, Any] = {}
        if settings.loss_rows:
            results["validation_loss"] = self.learner.validation_loss(collate(group) for group in groups)
        asked = pick_rows(rows, settings.answer_rows)[self.rank :: self.workers]
        with self.learner.autocast():
            answers = evaluate_exact_match(
                self.learner.model,
                self.processor,
                asked,
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
            )
        everyone: list[Any] = [answers]
        if self.workers > 1:
            everyone = [None] * self.workers
            distributed.all_gather_object(everyone, answers)
        results["exact_match"] = accuracy_by_task(answer for part in everyone for answer in part)
        self._report_evaluation(done, results, time.monotonic() - started)
        return results

    def _report_evaluation(self, done: int, results: dict[str, Any], seconds: float) -> None:
        values = {f"validation/exact_match/{task}": share for task, share in results["exact_match"].items()}
        if "validation_loss" in results:
            values["validation/loss"] = results["validation_loss"]
        if self.tracker is not None:
            self.tracker.metrics(values, done)
        shown = ", ".join(f"{name.removeprefix('validation/')} {value:.3f}" for name, value in values.items())
        self._say(f"validation after step {done}: {shown} ({seconds:.0f} s)")

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


class Crashes(ray.train.UserCallback):
    """Says in the job's output that a worker has died, and of what; runs in Ray Train's controller."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        del run_context
        for rank, error in worker_exceptions.items():
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            print(f"worker {rank} failed: {last}", flush=True)


def _threads() -> int:
    """As many torch threads as the worker was given CPUs, which may be more than there are."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, min(int(given), os.cpu_count() or 1))


def _peak_memory(device: torch.device) -> int:
    """Bytes at most in use so far: of GPU memory, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _opens(image: Any) -> bool:
    try:
        image.open()
    except DataError:
        return False
    return True
