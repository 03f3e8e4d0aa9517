"""Fine-tuning a vision-language model with LoRA and Skip-Vision on Ray Train, tracked in MLflow.

`run_finetune` is the whole job: claim its folder, check everything that can be checked without training,
train, upload the adapter. A job that was stopped or killed at any point is resumed by running the same
configuration again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines._compat import configure_ray_train
from pipelines.cluster.session import check_ray_address, ray_is_running, ray_session
from pipelines.data.rejects import count_rejects, rejected_rows
from pipelines.data.rows import TrainingRow
from pipelines.finetune.answers import Answered, answer_rows
from pipelines.finetune.checks import check_model, check_workers
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.data import FinetuneData, keep_choice, read_data
from pipelines.finetune.folder import FinetuneFolder
from pipelines.finetune.teacher_cache import claim_cache
from pipelines.shared.console import say
from pipelines.shared.files import is_storage_error, storage_error
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run
from skipvision.errors import DataError, SkipVisionError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from pipelines.finetune.worker import Assignment


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, resume or report the run ``config.name`` and return its result.

    The result holds ``adapter`` (folder), ``steps``, ``loss``, ``validation_loss``, ``exact_match`` per
    task, ``training_seconds``, ``seconds_per_step`` (median), ``rejected_rows``, ``unrecorded_values``
    (metrics that MLflow did not take), ``mlflow_uri``, ``mlflow_run_id``, ``model_version`` and
    ``already_finished``. With a teacher it also holds ``answers_loss``, ``distill_loss``,
    ``validation_distill_loss`` and ``flops_per_row`` (`pipelines.finetune.flops`), and ``answered_rows`` if
    the full-token model answered any, and ``teacher_cache`` (bytes and rows) with ``distillation.cache``.

    Raises:
        ConfigError: settings that contradict each other, a path that does not exist, or an earlier start with
            other settings.
        DataError: no usable row, more unusable rows than allowed, or rows that have changed.
        ResourceError: the cluster is too small.
        TrackingError: MLflow does not answer.
    """
    folder = FinetuneFolder(config.storage_path, config.name)
    with folder.claimed():
        resumed = folder.resume(config, with_changes=config.resume_with_changes)
        if result := finished_result(config, folder, folder.adapter):
            return {**result, "already_finished": True}
        # Ray is left after the MLflow run has ended, because stopping it takes seconds.
        with ExitStack() as ray:
            plan = None if folder.trained else _prepare(config, folder, ray, resumed=resumed)
            with tracked_run(config, folder, *_description(config, plan)) as run:
                if plan is not None:
                    _train(plan, folder, run, ray)
                run.advice = (
                    f"The training is done and its adapter is safe in {folder.adapter}. Run the same job "
                    "again to upload it; nothing is trained twice"
                )
                version = _upload(config, folder, run, record_results=plan is None and not run.resumed)
        result = {
            "run": folder.name,
            "adapter": str(folder.adapter),
            **folder.state["trained"],
            "mlflow_uri": run.uri,
            "mlflow_run_id": run.run_id,
            "model_version": version,
        }
        folder.remember(result=result)
        return {**result, "already_finished": False}


# --------------------------------------------------------------------------------------- before training


@dataclass(frozen=True)
class _Plan:
    """A checked training.

    Attributes:
        config: the settings with absolute paths.
        data: the rows.
        parameters: numbers of parameters of the model, for MLflow.
    """

    config: FinetuneConfig
    data: FinetuneData
    parameters: Mapping[str, int]

    @property
    def steps(self) -> int:
        return self.data.steps(self.config)


def _prepare(config: FinetuneConfig, folder: FinetuneFolder, ray: ExitStack, *, resumed: bool) -> _Plan:
    """Check model, workers and data. This joins a Ray that exists, and starts one only to answer rows."""
    absolute = config.resolved()
    check_ray_address()
    say(f"job {config.name!r}: checking the model and the data …")
    model = check_model(absolute)
    if ray_is_running():
        ray.enter_context(ray_session())
    check_workers(absolute.scaling)

    def answer(rows: Sequence[TrainingRow]) -> Answered:
        ray.enter_context(ray_session())
        return answer_rows(absolute, folder.answers, rows)

    data = read_data(absolute, folder, model.processor, model.positions, answer)
    if resumed and folder.state["data"] != data.fingerprint:
        if folder.has_work:
            raise DataError(
                f"{config.data.train} has changed since run {config.name!r} began; restore it, or choose "
                "another name"
            )
        folder.forget()
    changes = [*folder.state.get("changes", []), *folder.changes]
    if folder.changes:
        say("resuming with other settings:\n  " + "\n  ".join(folder.changes))
    folder.hold(data=data.fingerprint, changes=changes)  # until the MLflow run has started
    return _Plan(absolute, data, model.parameters)


def _description(config: FinetuneConfig, plan: _Plan | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the parameters of a new MLflow run."""
    if plan is None:  # only the recording is left
        settings = config.model_dump(mode="json")
        return settings, settings
    settings, data = plan.config.model_dump(mode="json"), plan.data
    facts = {"rows": len(data.rows), "fingerprint": data.fingerprint, "steps": plan.steps}
    facts |= {"answered_rows": data.answered} if data.answered else {}
    return settings, {**settings, "data_set": facts, **plan.parameters}


# ---------------------------------------------------------------------------------------------- training


def _train(plan: _Plan, folder: FinetuneFolder, run: Tracker, ray: ExitStack) -> None:
    data = plan.data
    if not folder.has_work:
        keep_choice(data, folder)
    if not run.resumed:
        run.metrics({"rows": float(len(data.rows)), **rejected_rows(data.rejected)}, 0)
        if data.rejected:
            run.store(folder.rejects)
    if changes := folder.state["changes"]:
        run.tag("resumed_with_changes", "; ".join(changes))
    say(f"job {folder.name!r}: {len(data.rows)} rows, {plan.steps} steps, MLflow at {run.uri}")
    if plan.config.distillation_cached:
        say(claim_cache(plan.config, folder.teacher, data.rows))
    with _rejects_recorded(folder, run, plan.steps):
        ray.enter_context(ray_session())
        trained = _fit(plan, folder, run)
    trained |= {"answered_rows": data.answered} if data.answered else {}
    folder.remember(trained={**trained, "rejected_rows": sum(count_rejects(folder.rejects).values())})


@contextmanager
def _rejects_recorded(folder: FinetuneFolder, run: Tracker, step: int) -> Iterator[None]:
    """After an error, record the rejects that turned up during training."""
    try:
        yield
    except Exception:
        with suppress(TrackingError):
            _record_rejects(folder, run, step)
        raise


def _record_rejects(folder: FinetuneFolder, run: Tracker, step: int) -> None:
    if folder.rejects.exists():
        run.metrics(rejected_rows(count_rejects(folder.rejects)), step)
        run.close()
        run.store(folder.rejects)


def _upload(
    config: FinetuneConfig, folder: FinetuneFolder, run: Tracker, *, record_results: bool
) -> str | None:
    """Upload the adapter, register it if so configured, and return its model version."""
    say(f"uploading the adapter {folder.adapter} to MLflow …")
    tracking, trained = config.tracking, folder.state["trained"]
    _record_rejects(folder, run, trained["steps"])
    if record_results:
        run.metrics(_results(trained), trained["steps"])
    if tracking.registered_model is None:
        run.store(folder.adapter)
        return None
    version = run.register(folder.adapter, tracking.registered_model, tracking.alias)
    return f"{tracking.registered_model}/{version}"


def _results(trained: Mapping[str, Any]) -> dict[str, float]:
    """Return the last values of the metrics that the workers recorded in the run of the training."""
    values = {f"validation/exact_match/{task}": v for task, v in trained.get("exact_match", {}).items()}
    values |= {f"flops_per_row/{name}": float(v) for name, v in trained.get("flops_per_row", {}).items()}
    for name in ("loss", "answers_loss", "distill_loss"):
        named = {name: trained.get(name), f"validation/{name}": trained.get(f"validation_{name}")}
        values |= {name: value for name, value in named.items() if value is not None}
    return values


def _fit(plan: _Plan, folder: FinetuneFolder, run: Tracker) -> dict[str, Any]:
    """Train from the last checkpoint to the end, through worker crashes; returns the result of rank 0.

    Raises:
        SkipVisionError: a worker raised it.
        StorageError: Ray Train cannot write to the folder of checkpoints.
    """
    configure_ray_train()
    import ray.train

    from pipelines.finetune.worker import Assignment

    work = Assignment(
        config=plan.config,
        rows=plan.data.rows,
        lengths=plan.data.lengths,
        validation=plan.data.validation,
        steps=plan.steps,
        adapter=folder.adapter,
        checkpoints=folder.checkpoints,
        start_from=folder.repair_checkpoints(),
        rejects=folder.rejects,
        teacher=folder.teacher,
        tracking_uri=run.uri,
        run_id=run.run_id,
    )
    try:
        result: Any = _trainer(work, folder).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, SkipVisionError):
            raise error.controller_failure from error
        if is_storage_error(error.controller_failure):
            raise storage_error(error.controller_failure, folder.checkpoints) from error
        raise
    except SystemExit:  # Ray Train turns Ctrl-C into it
        raise KeyboardInterrupt from None
    trained: dict[str, Any] = result.return_value
    return trained


def _announce_workers(workers: int, resources: Mapping[str, float]) -> None:
    """Print which workers are starting, and which resources they wait for."""
    import ray

    each = " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
    workers_text = f"a worker with {each}" if workers == 1 else f"{workers} workers with {each} each"
    free = ray.available_resources()
    busy = [name for name, amount in resources.items() if free.get(name, 0) < amount * workers]
    delay = f" once enough {' and '.join(busy)} is free; at the moment it is in use" if busy else ""
    say(f"waiting for {workers_text} to start and to load the model{delay} …")


def _trainer(work: Assignment, folder: FinetuneFolder) -> TorchTrainer:
    """Return the Ray Train trainer of the configured workers."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.finetune.worker import Failures, train_worker

    training, scaling = work.config.training, work.config.scaling
    resources = check_workers(scaling)
    _announce_workers(scaling.workers, resources)
    # Ray's annotations describe the first version of this interface.
    train: Any = ray.train
    trainer: Any = TorchTrainer
    return trainer(
        # The rows are an argument of the function and not in the config, which Ray shows in its dashboard.
        partial(train_worker, work),
        train_loop_config=work.config.model_dump(mode="json"),
        scaling_config=train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=train.RunConfig(
            name=folder.checkpoints.name,
            storage_path=str(folder.path),
            failure_config=train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=training.keep_checkpoints),
            callbacks=[Failures()],
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )
