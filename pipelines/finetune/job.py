"""Fine-tuning a vision-language model with LoRA and Skip-Vision on Ray Train, tracked in MLflow.

`run_finetune` is the whole story of a run: claim its folder, see what of it is done already, check
everything that can be checked before Ray is started or kept busy, train, hand in the adapter. A run that
was killed anywhere on this way is continued by running the same configuration again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.cluster.session import ray_is_there, ray_session
from pipelines.data.rejects import count_rejects, rejected_rows
from pipelines.finetune.checks import absolute_paths, check_model, check_workers
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.data import FinetuneData, keep_choice, read_data
from pipelines.finetune.folder import FinetuneFolder, real_paths
from pipelines.shared.paths import output_path
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.errors import DataError, SkipVisionError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from pipelines.finetune.worker import Assignment

__all__ = ["FinetuneConfig", "run_finetune"]


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, or continue, or only report the run ``config.name``; returns its result.

    The result holds ``adapter`` (folder), ``steps``, ``loss``, ``validation_loss``, ``exact_match`` per
    task, ``training_seconds``, ``seconds_per_step`` (median), ``rejected_rows``, ``unrecorded_values``
    (metrics that MLflow was away for), ``mlflow_uri``, ``mlflow_run_id``, ``model_version`` and
    ``already_finished``.
    """
    folder = FinetuneFolder(output_path(config.storage, "storage"), config.name)
    with folder.claimed():
        resumed = folder.resumes(config.model_dump(mode="json"), with_changes=config.resume_with_changes)
        if result := folder.state.get("result"):
            print(f"run {folder.finished_already(config.tracking, folder.adapter)}", flush=True)
            return {**result, "already_finished": True}
        uri = config.tracking.absolute_uri(folder.storage)
        if "trained" not in folder.state:
            _train(config, folder, uri, resumed=resumed)
        return _hand_in(config, folder, uri)


def _train(config: FinetuneConfig, folder: FinetuneFolder, uri: str, *, resumed: bool) -> None:
    absolute = absolute_paths(config)
    print(f"run {config.name!r}: checking the model and the data …", flush=True)
    processor, parameters = check_model(absolute)
    with ExitStack() as stack:
        if ray_is_there():
            stack.enter_context(ray_session())
        check_workers(absolute.scaling)
        data = read_data(absolute, folder, processor)
        resumed = resumed and _is_same_data(config, folder, data)
        tracker = _begin(config, folder, uri, data)
        if not resumed or tracker.run_id != folder.state.get("mlflow_run_id"):
            _describe(tracker, absolute, data, parameters, folder)
        _remember(config, folder, data, tracker)
        steps = data.steps(absolute)
        print(f"run {config.name!r}: {len(data.rows)} rows, {steps} steps, MLflow at {uri}", flush=True)
        try:
            stack.enter_context(ray_session())
            trained = _fit(absolute, folder, data, tracker)
        except BaseException as error:  # also when told to stop: the run must not seem to go on
            with suppress(TrackingError):
                # This first: whoever stops a job gives it little time.
                tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
                _record_rejects(tracker, folder, steps)
            raise
    folder.remember(trained={**trained, "rejected_rows": sum(count_rejects(folder.rejects).values())})


def _is_same_data(config: FinetuneConfig, folder: FinetuneFolder, data: FinetuneData) -> bool:
    """Whether a run goes on with the rows it began with; refused if not, unless nothing was learnt yet."""
    same: bool = folder.state["data"] == data.fingerprint
    if not same and folder.begun:
        raise DataError(
            f"{config.data.train} has changed since run {config.name!r} began; restore it, or choose another "
            "name"
        )
    if not same:
        folder.state = {}
    return same


def _begin(config: FinetuneConfig, folder: FinetuneFolder, uri: str, data: FinetuneData) -> Tracker:
    """The run in MLflow, new or again; from here on the run has a folder."""
    tracker = _start(config, folder, uri)
    if not folder.begun:
        keep_choice(data, folder)
    return tracker


def _start(config: FinetuneConfig, folder: FinetuneFolder, uri: str) -> Tracker:
    return Tracker.start(
        uri,
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=folder.storage / "mlflow-artifacts",
        run_id=_known_run(config, folder),
    )


def _known_run(config: FinetuneConfig, folder: FinetuneFolder) -> str | None:
    """The run in MLflow to go on with; another MLflow than before does not know it."""
    before = folder.state.get("config", {}).get("tracking", {}).get("uri")
    return folder.state.get("mlflow_run_id") if before == config.tracking.uri else None


def _remember(config: FinetuneConfig, folder: FinetuneFolder, data: FinetuneData, tracker: Tracker) -> None:
    """What the run goes on with from here, changes that were asked for included."""
    settings = config.model_dump(mode="json")
    changes = [*folder.state.get("changes", []), *folder.changes]
    if folder.changes:
        print("going on with other settings:\n  " + "\n  ".join(folder.changes), flush=True)
        tracker.note("resumed_with_changes", "; ".join(changes))
    folder.remember(
        config=settings,
        paths={**real_paths(settings), **folder.state.get("paths", {})},
        data=data.fingerprint,
        mlflow_run_id=tracker.run_id,
        changes=changes,
    )


def _record_rejects(tracker: Tracker, folder: FinetuneFolder, step: int) -> None:
    """Hand in the rejects as they are now, those that turned up on the way included."""
    if folder.rejects.exists():
        tracker.metrics(rejected_rows(count_rejects(folder.rejects)), step)
        tracker.close()
        tracker.store(folder.rejects)


def _hand_in(config: FinetuneConfig, folder: FinetuneFolder, uri: str) -> dict[str, Any]:
    """The adapter goes to MLflow; only then the run counts as finished."""
    tracking, version = config.tracking, None
    print(f"handing in the adapter {folder.adapter} to MLflow …", flush=True)
    try:
        known = _known_run(config, folder)
        tracker = Tracker(uri, known) if known else _start(config, folder, uri)
        if not known:  # another MLflow than the training was recorded in
            settings = config.model_dump(mode="json")
            tracker.parameters(settings)
            folder.remember(config=settings, mlflow_run_id=tracker.run_id)
        _record_rejects(tracker, folder, folder.state["trained"]["steps"])
        if tracking.registered_model is None:
            tracker.store(folder.adapter)
        else:
            version = tracker.register(folder.adapter, tracking.registered_model, tracking.alias)
        tracker.finish("FINISHED")
    except TrackingError as error:
        raise TrackingError(
            f"{error}\nThe training is done and its adapter is safe in {folder.adapter}. Run the same job "
            "again to hand it in; nothing is trained twice"
        ) from error
    result = {
        "run": folder.name,
        "adapter": str(folder.adapter),
        **folder.state["trained"],
        "mlflow_uri": uri,
        "mlflow_run_id": tracker.run_id,
        "model_version": version and f"{tracking.registered_model}/{version}",
    }
    folder.remember(result=result)
    return {**result, "already_finished": False}


def _describe(
    tracker: Tracker,
    config: FinetuneConfig,
    data: FinetuneData,
    parameters: Mapping[str, int],
    folder: FinetuneFolder,
) -> None:
    resolved = config.model_dump(mode="json")
    facts = {"rows": len(data.rows), "fingerprint": data.fingerprint, "steps": data.steps(config)}
    tracker.parameters({**resolved, "data_set": facts, **parameters})
    tracker.text(yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
    tracker.metrics({"rows": float(len(data.rows)), **rejected_rows(data.rejected)}, 0)
    tracker.close()
    if data.rejected:
        tracker.store(folder.rejects)


# ------------------------------------------------------------------------------------------ training


def _fit(
    config: FinetuneConfig, folder: FinetuneFolder, data: FinetuneData, tracker: Tracker
) -> dict[str, Any]:
    """Ray Train from the last checkpoint to the end, through worker crashes; returns what rank 0 returns.

    An error of ours in a worker is raised as it is.
    """
    # Ray Train's defaults suit runs of days: it looks at its workers every two seconds and reports wait
    # for it. Its print patch doubles lines.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    import ray.train

    from pipelines.finetune.worker import Assignment

    work = Assignment(
        config=config,
        rows=data.rows,
        lengths=data.lengths,
        validation=data.validation,
        steps=data.steps(config),
        adapter=folder.adapter,
        rejects=folder.rejects,
        tracking_uri=tracker.uri,
        run_id=tracker.run_id,
    )
    try:
        result = _trainer(work, folder).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, SkipVisionError):
            raise error.controller_failure from error
        raise
    except SystemExit:  # what Ray Train makes of Ctrl-C
        raise KeyboardInterrupt from None
    trained: dict[str, Any] = result.return_value
    return trained


def _say_what_is_waited_for(workers: int, resources: Mapping[str, float]) -> None:
    import ray

    each = " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
    who = f"a worker with {each}" if workers == 1 else f"{workers} workers with {each} each"
    free = ray.available_resources()
    busy = [name for name, amount in resources.items() if free.get(name, 0) < amount * workers]
    so_long = f" once enough {' and '.join(busy)} is free, for now it is in use" if busy else ""
    print(f"waiting for {who} to start and to load the model{so_long} …", flush=True)


def _trainer(work: Assignment, folder: FinetuneFolder) -> TorchTrainer:
    """What runs the work in Ray Train, on as many workers as are configured."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines.finetune.worker import Failures, train_worker

    training, scaling = work.config.training, work.config.scaling
    resources = check_workers(scaling)
    _say_what_is_waited_for(scaling.workers, resources)
    return TorchTrainer(
        # The rows travel with the function: Ray shows the config of a run in its dashboard.
        partial(train_worker, work),
        train_loop_config=work.config.model_dump(mode="json"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=folder.checkpoints.name,
            storage_path=str(folder.path),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=training.keep_checkpoints),
            callbacks=[Failures()],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
