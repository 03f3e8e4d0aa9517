"""A Ray Train worker: steps, checkpoints, validation, and the adapter at the end."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from pipelines.cluster.cpus import usable_cpus
from pipelines.cluster.metrics import JobGauges
from pipelines.data.collate import Batch, Collator
from pipelines.data.rejects import LateRejects, count_rejects, rejected_rows
from pipelines.data.rows import DATA_SETS, TrainingRow, pick_rows
from pipelines.engines.loading import arithmetic, load_frozen, load_processor
from pipelines.evaluation.exact_match import accuracy_by_task, evaluate_exact_match
from pipelines.evaluation.items import OVERALL
from pipelines.finetune.batches import LengthGroupedBatches, prefetched
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.flops import row_flops
from pipelines.finetune.folder import STATE
from pipelines.finetune.learner import Learner, StepStats, prepare
from pipelines.finetune.memory import Memory, peak_memory
from pipelines.finetune.on_policy import OnPolicy
from pipelines.finetune.progress import Progress
from pipelines.finetune.teacher_cache import TeacherCache
from pipelines.shared.console import say
from pipelines.shared.files import storage_errors
from pipelines.tracking.run import Tracker
from skipvision.errors import DataError, SkipVisionError

_EMPTY_STEPS = 3
"""A run ends after this many consecutive steps without a usable row."""

_GAUGES = {
    "skipvision_training_steps": "steps of the run",
    "skipvision_training_steps_done": "steps done, over all starts of the run",
    "skipvision_training_step_seconds": "duration of the newest step, with the wait for its images (s)",
    "skipvision_training_loss": "loss of the newest step",
    "skipvision_training_images_per_second": "images of the newest step per second, over all workers",
}


@dataclass(frozen=True)
class Assignment:
    """The work of a run, the same for all workers. Paths are absolute.

    ``start_from`` is the checkpoint to continue from if Ray Train knows none.
    """

    config: FinetuneConfig
    rows: Sequence[TrainingRow]
    lengths: Sequence[int]
    validation: Sequence[TrainingRow]
    steps: int
    adapter: Path
    checkpoints: Path
    start_from: Path | None
    rejects: Path
    teacher: Path
    tracking_uri: str
    run_id: str


def train_worker(work: Assignment, _: dict[str, Any]) -> dict[str, Any]:
    """Train from the last checkpoint to the end and return the run's result."""
    context = ray.train.get_context()
    torch.set_num_threads(_threads())
    transformers.utils.logging.disable_progress_bar()
    _quieten()
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
    """One of ``workers`` processes that train together. Rank 0 also reports and saves."""

    def __init__(self, work: Assignment, rank: int, workers: int, tracker: Tracker | None) -> None:
        self.work, self.config = work, work.config
        self.rank, self.workers, self.tracker = rank, workers, tracker
        device = ray.train.torch.get_device()
        compute = arithmetic(self.config.training.precision, device)
        self.processor = load_processor(self.config.model.path)
        model = prepare(load_frozen(self.config.model, compute, device), self.config)
        self.cache = TeacherCache(work.teacher, rank) if self.config.distillation_cached else None
        on_policy = OnPolicy.of(self.config, model, self.processor)
        self.learner = Learner(model, self.config, device, self.cache, on_policy)
        self.memory = Memory(self.learner, tracker)
        # The prefetching thread's own tokenizer: fast tokenizers must not be shared between threads.
        self.collator = Collator(load_processor(self.config.model.path))
        self.progress = Progress(work.steps)
        data, stop = self.config.data, self.config.data.on_bad_row == "stop"
        # The same file may serve both purposes; its rows are then in both data sets.
        same = data.train == data.validation
        self.leave_out, self.leave_out_of_validation = (
            LateRejects(work.rejects, DATA_SETS if same else (data_set,), stop=stop) for data_set in DATA_SETS
        )
        self._empty_steps = 0
        self._gauges = JobGauges(work.config.name, _GAUGES)

    def run(self) -> dict[str, Any]:
        done = self._restore()
        training, every = self.config.training, self.config.evaluation.every
        steps = self.work.steps
        self._say(f"resuming after step {done} of {steps}" if done else f"training begins: {steps} steps")
        self.progress.start(done)
        if self.rank == 0:  # before the first step: a run that never gets there is seen as stuck
            self._gauges.set(self._steps(done))
        first = done
        for batches in self._batches(done):
            if done == first and self.rank == 0:
                self.memory.predict(batches)
                self.progress.start(done)  # the prediction is not part of the step
            stats = self.learner.step(batches, done, self.work.steps)
            done += 1
            self._record(done, stats)
            if done == first + 1 and self.rank == 0:
                self.memory.report()
            if done % training.checkpoint_every == 0 or done == self.work.steps:
                self._checkpoint(done)
            if every and done % every == 0 and done < self.work.steps:
                self._evaluate(done)
            self.progress.start(done)
        if self.rank == 0:
            # Before the validation, which may fail: it opens images that may have become unreadable.
            with storage_errors(self.work.adapter):
                sv.save_adapter(self.learner.model, self.work.adapter)
        summary = {**self.progress.summary(), **self.memory.result(done)}
        return {**summary, **self._flops(done), **self._evaluate(done)}

    # ------------------------------------------------------------------------------------- steps

    def _batches(self, first: int) -> Iterator[list[Batch]]:
        """Yield this worker's share of every step from ``first`` on."""
        training = self.config.training
        order = LengthGroupedBatches(self.work.lengths, training.batch_size, self.config.seed)

        def share(step: int) -> list[Batch]:
            groups = order.share(step, self.rank, self.workers, training.micro_batch_size)
            rows = ([self.work.rows[i] for i in group] for group in groups)
            return list(_batches_of(self.collator, rows, self.leave_out))

        return prefetched(share, range(first, self.work.steps), training.prefetch)

    def _record(self, done: int, stats: StepStats) -> None:
        self._check_not_empty(done, stats)
        seconds = self.progress.finish(stats)
        if self.rank == 0:
            self._export(done, stats, seconds)
        if self.tracker is not None and stats.learnt_tokens:
            values = {
                "loss": stats.loss,
                **stats.parts,
                "learning_rate": stats.learning_rate,
                "grad_norm": stats.grad_norm,
                "step_seconds": seconds,
                "images_per_second": stats.images / seconds,
                "tokens_per_second": stats.tokens / seconds,
                "peak_memory_bytes": float(peak_memory(self.learner.device)),
            }
            self.tracker.metrics(values, done)
        if done % self.config.training.log_every == 0 or done == self.work.steps:
            self._say(self.progress.line(done, stats))

    def _export(self, done: int, stats: StepStats, seconds: float) -> None:
        """Set the gauges that Ray exports to Prometheus."""
        values = {
            **self._steps(done),
            "skipvision_training_step_seconds": seconds,
            "skipvision_training_images_per_second": stats.images / seconds,
        }
        if stats.learnt_tokens:
            values["skipvision_training_loss"] = stats.loss
        self._gauges.set(values)

    def _steps(self, done: int) -> dict[str, float]:
        return {
            "skipvision_training_steps": float(self.work.steps),
            "skipvision_training_steps_done": float(done),
        }

    def _check_not_empty(self, done: int, stats: StepStats) -> None:
        """Raise `DataError` after several steps without a usable row: the storage of images is gone."""
        self._empty_steps = 0 if stats.learnt_tokens else self._empty_steps + 1
        if self._empty_steps >= min(_EMPTY_STEPS, self.work.steps):
            raise DataError(
                f"no row of the last {self._empty_steps} steps (to step {done}) could be used; the reasons "
                f"are in {self.work.rejects}. Restore the images, then run the same job again: it resumes "
                "from the last checkpoint"
            )

    # ------------------------------------------------------------------------------- checkpoints

    def _restore(self) -> int:
        """Load the last checkpoint and return the number of completed steps."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.work.start_from is not None:
            checkpoint = ray.train.Checkpoint.from_directory(self.work.start_from)
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, weights_only=True, map_location=self.learner.device)
        self.learner.load_state(state)
        self.progress.step_seconds = state["step_seconds"]
        self.progress.last_loss, self.progress.last_parts = state["loss"], state.get("parts", {})
        return int(state["step"])

    def _checkpoint(self, done: int) -> None:
        """Report a checkpoint. Ray copies the folder to the storage before it counts."""
        if self.rank:
            ray.train.report({"step": done})
            return
        if self.tracker is not None:
            self.tracker.metrics(rejected_rows(count_rejects(self.work.rejects)), done)
            self.tracker.flush()  # a run that resumes from here will not repeat these steps
        progress = self.progress
        extra = {
            "step": done,
            "step_seconds": progress.step_seconds,
            "loss": progress.last_loss,
            "parts": dict(progress.last_parts),
        }
        name = f"checkpoint_{done:08d}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, STATE)
            with storage_errors(file), file.open("wb") as stream:  # torch hides the cause for a path
                torch.save({**self.learner.state(), **extra}, stream)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            with storage_errors(self.work.checkpoints / name):
                ray.train.report(
                    {"step": done, "loss": self.progress.last_loss},
                    checkpoint=checkpoint,
                    checkpoint_dir_name=name,
                )

    # ------------------------------------------------------------------------ flops and evaluation

    def _flops(self, done: int) -> dict[str, Any]:
        """Return the FLOPs of the first readable row with a teacher, measured and predicted."""
        if self.rank or not self.config.training.teaches:
            return {}
        single = ([row] for row in self.work.rows)
        batch = next(_batches_of(Collator(self.processor), single, self.leave_out), None)
        if batch is None:
            return {}
        flops = row_flops(self.learner, batch)
        if self.tracker is not None:
            self.tracker.metrics({f"flops_per_row/{name}": float(v) for name, v in flops.items()}, done)
        giga = {name: f"{value / 1e9:.3g}" for name, value in flops.items()}
        self._say(
            f"a row of {batch.tokens} tokens costs {giga['student']} GFLOPs (predicted: "
            f"{giga['student_predicted']}), its teacher {giga['teacher']} more ({giga['teacher_predicted']})"
        )
        return {"flops_per_row": flops, **self._cache_size(done)}

    def _cache_size(self, done: int) -> dict[str, Any]:
        if self.cache is None:
            return {}
        size, rows = self.cache.size()
        if self.tracker is not None:
            self.tracker.metrics(
                {"teacher_cache_bytes": float(size), "teacher_cache_rows": float(rows)}, done
            )
        return {"teacher_cache": {"bytes": size, "rows": rows, "bytes_per_row": round(size / max(rows, 1))}}

    def _evaluate(self, done: int) -> dict[str, Any]:
        """Return validation loss and exact match after ``done`` steps. Workers share the rows."""
        settings, rows = self.config.evaluation, self.work.validation
        if not rows:
            return {}
        started = time.monotonic()
        questions = pick_rows(rows, settings.answer_rows)
        self._say(f"validation after step {done}: answering {len(questions)} questions …")
        ours = pick_rows(rows, settings.loss_rows)[self.rank :: self.workers]
        groups = [ours[i : i + settings.batch_size] for i in range(0, len(ours), settings.batch_size)]
        collate = Collator(self.processor)
        results: dict[str, Any] = {}
        if settings.loss_rows:
            batches = _batches_of(collate, groups, self.leave_out_of_validation)
            results |= self.learner.validation_losses(batches)
        with self.learner.autocast():
            answers = evaluate_exact_match(
                self.learner.model,
                self.processor,
                questions[self.rank :: self.workers],
                batch_size=settings.batch_size,
                max_new_tokens=settings.max_new_tokens,
                on_unreadable=self.leave_out_of_validation,
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
        for name in ("loss", "distill_loss"):
            if f"validation_{name}" in results:
                values[f"validation/{name}"] = results[f"validation_{name}"]
        if self.tracker is not None:
            self.tracker.metrics(values, done)
        self._say(f"validation after step {done}: {_shown(results)}, {seconds:.0f} s")

    def _say(self, line: str) -> None:
        if self.rank == 0:
            say(line)


class Failures(ray.train.UserCallback):
    """Handles failures of workers, in Ray Train's controller.

    After a crash Ray Train restarts the workers. A `SkipVisionError` would be raised again after a restart,
    so it ends the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        del run_context
        for error in worker_exceptions.values():
            if isinstance(error, SkipVisionError):
                raise ray.train.ControllerError(error)  # Ray Train does not retry it
        for rank, error in worker_exceptions.items():
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            say(f"worker {rank} failed: {last}")


def _shown(results: Mapping[str, Any]) -> str:
    """Return the results of a validation as text."""
    losses = {"validation_loss": "loss", "validation_distill_loss": "divergence from the teacher"}
    parts = [f"{text} {results[name]:.4f}" for name, text in losses.items() if name in results]
    if shares := results["exact_match"]:
        tasks = [f"{task} {share:.3f}" for task, share in shares.items() if task != OVERALL]
        parts.append(f"exact match {shares[OVERALL]:.3f}" + (f" ({', '.join(tasks)})" if tasks else ""))
    return ", ".join(parts) or "no row could be answered"


def _batches_of(
    collate: Collator, groups: Iterable[Sequence[TrainingRow]], leave_out: LateRejects
) -> Iterator[Batch]:
    """Yield a batch of the readable rows of each group that has any."""
    batches = (collate.readable(rows, leave_out) for rows in groups)
    return (batch for batch in batches if batch is not None)


def _quieten() -> None:
    """Silence log lines of Ray Train that repeat the job's own output."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO and announces every report
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):
            # The job prints a SkipVisionError once; its traceback is in Ray's log files.
            handler.addFilter(lambda _: not isinstance(sys.exc_info()[1], SkipVisionError))


def _threads() -> int:
    """Return the number of torch threads: the CPUs assigned by Ray, which may exceed those of the machine."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, min(int(given), usable_cpus()))
