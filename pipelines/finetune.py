"""Fine-tuning a vision-language model with LoRA and Skip-Vision on Ray Train, tracked in MLflow.

`run_finetune` is the whole story of a run: claim its folder, see what of it is done already, check
everything that can be checked before a cluster is kept busy, train, hand in the adapter. A run that
was killed anywhere on this way is continued by running the same configuration again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText

from pipelines.cluster import node_resources, ray_session, worker_resources
from pipelines.finetune_config import FinetuneConfig, ScalingSection
from pipelines.finetune_data import FinetuneData, read_data
from pipelines.learner import prepare
from pipelines.paths import input_path, output_path
from pipelines.run_folder import RunFolder
from pipelines.tracking import Tracker, TrackingError
from skipvision.errors import ConfigError, DataError, SkipVisionError

__all__ = ["FinetuneConfig", "run_finetune"]


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train, or continue, or only report the run ``config.name``; returns its result.

    The result holds ``adapter`` (folder), ``steps``, ``loss``, ``validation_loss``, ``exact_match`` per
    task, ``training_seconds``, ``seconds_per_step`` (median), ``rejected_rows``, ``unrecorded_values``
    (metrics that MLflow was away for), ``mlflow_uri``, ``mlflow_run_id``, ``model_version`` and
    ``already_finished``.
    """
    folder = RunFolder(output_path(config.storage, "storage"), config.name)
    with folder.claimed():
        resumed = folder.resumes(config.model_dump(mode="json"))
        if result := folder.state.get("result"):
            print(f"run {config.name!r} is finished already: {folder.adapter}", flush=True)
            return {**result, "already_finished": True}
        uri = config.tracking.absolute_uri(folder.storage)
        if "trained" not in folder.state:
            _train(config, folder, uri, resumed=resumed)
        return _hand_in(config, folder, uri)


def _absolute(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with every path absolute: workers run elsewhere."""
    data, model = config.data, config.model
    paths: dict[str, str | None] = {"train": input_path(data.train, "data.train")}
    if data.validation is not None:
        paths["validation"] = input_path(data.validation, "data.validation")
    if data.image_root is not None:
        paths["image_root"] = input_path(data.image_root, "data.image_root")
    with suppress(ConfigError):  # then it is a Hugging Face id, or loading it says that it is nothing
        model = model.model_copy(update={"path": input_path(model.path, "model.path")})
    storage = str(output_path(config.storage, "storage"))
    return config.model_copy(
        update={"data": data.model_copy(update=paths), "model": model, "storage": storage}
    )


def _train(config: FinetuneConfig, folder: RunFolder, uri: str, *, resumed: bool) -> None:
    absolute = _absolute(config)
    with ray_session():
        resources = _resources(config.scaling)
        parameters = _check_model(absolute)
        data = read_data(absolute, folder.rejects)
        if resumed and folder.state["data"] != data.fingerprint:
            if folder.begun:
                raise DataError(
                    f"{config.data.train} has changed since run {config.name!r} began; restore it, or choose "
                    "another name"
                )
            folder.state, resumed = {}, False
        tracker = Tracker.start(
            uri,
            experiment=config.tracking.experiment,
            run_name=config.name,
            artifacts=folder.storage / "mlflow-artifacts",
            run_id=folder.state.get("mlflow_run_id"),
        )
        if not resumed:
            _describe(tracker, absolute, data, parameters, folder)
            folder.remember(
                config=config.model_dump(mode="json"), data=data.fingerprint, mlflow_run_id=tracker.run_id
            )
        print(
            f"run {config.name!r}: {len(data.rows)} rows, {data.steps(absolute)} steps, MLflow at {uri}",
            flush=True,
        )
        try:
            trained = _fit(absolute, folder, data, tracker, resources)
        except Exception:
            with suppress(TrackingError):
                tracker.finish("FAILED")
            raise
    folder.remember(trained={**trained, "rejected_rows": sum(data.rejected.values())})


def _hand_in(config: FinetuneConfig, folder: RunFolder, uri: str) -> dict[str, Any]:
    """The adapter goes to MLflow; only then the run counts as finished."""
    tracker = Tracker(uri, folder.state["mlflow_run_id"])
    tracking, version = config.tracking, None
    try:
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


# ----------------------------------------------------------------------------------- before training


def _resources(scaling: ScalingSection) -> dict[str, float]:
    """What each worker gets; said if it is not free, refused if it is not there."""
    import ray

    if scaling.autoscaling:
        return {"CPU": float(scaling.cpus_per_worker or 1), "GPU": float(scaling.gpus_per_worker or 0)}
    each = worker_resources(
        node_resources(), scaling.workers, scaling.cpus_per_worker, scaling.gpus_per_worker
    )
    free = ray.available_resources()
    busy = [name for name, amount in each.items() if free.get(name, 0) < amount * scaling.workers]
    if busy:
        print(f"training will wait: not every {' and '.join(busy)} it needs is free now", flush=True)
    return each


def _check_model(config: FinetuneConfig) -> dict[str, int]:
    """Try LoRA and Skip-Vision on the model without its weights; returns how many parameters train.

    So an unsupported model or a wrong pattern is an error now, and not after every worker's restart.
    """
    try:
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(config.model.path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {config.model.path}: {error}") from error
    model = prepare(base, config)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trains in sizes if trains),
    }


def _describe(
    tracker: Tracker,
    config: FinetuneConfig,
    data: FinetuneData,
    parameters: Mapping[str, int],
    folder: RunFolder,
) -> None:
    resolved = config.model_dump(mode="json")
    facts = {"rows": len(data.rows), "fingerprint": data.fingerprint, "steps": data.steps(config)}
    tracker.parameters({**resolved, "data_set": facts, **parameters})
    tracker.text(yaml.safe_dump(resolved, sort_keys=False), "config.yaml")
    counts = {f"rejected_rows/{kind}": float(count) for kind, count in data.rejected.items()}
    counts |= {"rows": float(len(data.rows)), "rejected_rows": float(sum(data.rejected.values()))}
    tracker.metrics(counts, 0)
    tracker.close()
    if data.rejected:
        tracker.store(folder.rejects)


# ------------------------------------------------------------------------------------------ training


def _fit(
    config: FinetuneConfig,
    folder: RunFolder,
    data: FinetuneData,
    tracker: Tracker,
    resources: Mapping[str, float],
) -> dict[str, Any]:
    """Ray Train from the last checkpoint to the end, through worker crashes; returns what rank 0 returns."""
    # Ray Train's defaults suit runs of days: it looks at its workers every two seconds and reports wait
    # for it. Its print patch doubles lines.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    import ray.train
    from ray.train import LoggingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.finetune_worker import Assignment, Crashes, train_worker

    work = Assignment(
        config=config,
        rows=data.rows,
        lengths=data.lengths,
        validation=data.validation,
        steps=data.steps(config),
        adapter=folder.adapter,
        tracking_uri=tracker.uri,
        run_id=tracker.run_id,
    )
    trainer = TorchTrainer(
        # The rows travel with the function: Ray shows the config of a run in its dashboard.
        partial(train_worker, work),
        train_loop_config=config.model_dump(mode="json"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.workers,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        run_config=ray.train.RunConfig(
            name=folder.checkpoints.name,
            storage_path=str(folder.path),
            failure_config=ray.train.FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.training.keep_checkpoints),
            callbacks=[Crashes()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise _cause(error) from error
    trained: dict[str, Any] = result.return_value
    return trained


def _cause(error: Any) -> Exception:
    """The error of ours that stopped a worker, if it was one."""
    for failure in error.worker_failures.values():
        inner = getattr(failure, "_base_exc", failure)
        if isinstance(inner, SkipVisionError):
            return inner
    return error
