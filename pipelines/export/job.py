"""The export job: one folder from base model and adapter, recorded in MLflow, registered and pushed."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers

import skipvision as sv
from pipelines.engines.config import ModelSection
from pipelines.engines.loading import check_known
from pipelines.engines.model import EngineModel, find_model
from pipelines.export.config import ExportConfig
from pipelines.export.folder import ExportFolder
from pipelines.export.hub import check_hub, push
from pipelines.export.numbers import numbers_of
from pipelines.shared.console import say
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run
from skipvision.errors import Problems
from skipvision.exporting.write import ExportPlan, plan_export, write_export


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Export a model, record, register and push it; or report that the job is finished.

    Raises:
        ConfigError: the settings contradict each other, the model, the adapter or the first start.
        AdapterError: the adapter is damaged, does not fit, or cannot be merged.
        HubError: the hub does not answer, or refuses the model.
        TrackingError: MLflow does not answer.
    """
    folder = ExportFolder(config.storage_path, config.name)
    with folder.claimed():
        folder.resume(config)
        absolute = config.resolved()
        model = _find(config, folder)
        result = finished_result(config, folder, folder.model)
        if result is not None and result["hub"] == _repository(config):
            return {**result, "already_finished": True}
        plan = _check(absolute, folder, model)
        folder.hold(adapter=model.adapter_label)
        settings = config.model_dump(mode="json")
        with tracked_run(config, folder, settings, {**settings, "adapter": model.adapter_label}) as run:
            if plan is not None:
                _write(plan, model, run)
            run.advice = f"The model is complete in {folder.model}. Run the same job again to record it"
            result = _publish(config, folder, model, run)
        folder.remember(result=result)
    return {**result, "already_finished": False}


class _Settings(NamedTuple):
    """The settings that `find_model` reads."""

    model: ModelSection
    skip: sv.SkipConfig


def _find(config: ExportConfig, folder: ExportFolder) -> EngineModel:
    """Find the base model and the adapter, and check that they are those of the job's first start."""
    given = ModelSection(path=config.model.path, adapter=config.model.adapter)
    # With a SkipConfig it does not read the adapter, which `plan_export` reads together with the rest.
    skip = config.skip or sv.SkipConfig.full()
    uri = config.tracking.absolute_uri(folder.storage)
    pinned = folder.state.get("adapter") if folder.has_work else None
    return find_model(_Settings(given, skip), uri, folder.downloads, pinned)


def _check(config: ExportConfig, folder: ExportFolder, model: EngineModel) -> ExportPlan | None:
    """Check model, adapter and hub before any work; None if the model is exported already.

    Raises:
        ConfigError: lists all problems.
    """
    plan: ExportPlan | None = None
    problems = Problems()
    if not folder.has_work:
        plan = problems.collect(lambda: _plan(config, folder, model))
    hub = config.hub
    if hub is not None:
        pushed = folder.state.get("pushed") == hub.repository
        problems.collect(lambda: check_hub(hub, pushed=pushed))
    problems.raise_any()
    return plan


def _plan(config: ExportConfig, folder: ExportFolder, model: EngineModel) -> ExportPlan:
    check_known(model.base, "model.path")
    return plan_export(model.base, model.adapter, folder.model, config=config.skip, dtype=config.model.dtype)


def _write(plan: ExportPlan, model: EngineModel, run: Tracker) -> None:
    transformers.utils.logging.disable_progress_bar()
    numbers = numbers_of(model.adapter, model.adapter_label, run.uri)
    say(f"exporting {model.label} to {plan.folder} …")
    write_export(plan, numbers)


def _publish(config: ExportConfig, folder: ExportFolder, model: EngineModel, run: Tracker) -> dict[str, Any]:
    """Record, register and push the exported model, and return the job's result."""
    weights = sum(file.stat().st_size for file in folder.model.glob("*.safetensors"))
    run.metrics({"weight_bytes": float(weights)}, 0)
    version = None
    if config.tracking.registered_model is None:
        for name in ("README.md", "config.json"):
            run.store(folder.model / name)
    else:
        say(f"uploading {folder.model} to MLflow …")
        number = run.register(folder.model, config.tracking.registered_model, config.tracking.alias)
        version = f"{config.tracking.registered_model}/{number}"
    address = None
    if config.hub is not None:
        say(f"pushing {folder.model} to {config.hub.repository} …")
        address = push(folder.model, config.hub)
        folder.remember(pushed=config.hub.repository)
        run.tag("hub", address)
    return {
        "model": str(folder.model),
        "adapter": model.adapter_label,
        "weight_bytes": weights,
        "model_version": version,
        "hub": _repository(config),
        "hub_address": address,
        "mlflow_uri": run.uri,
        "mlflow_run_id": run.run_id,
    }


def _repository(config: ExportConfig) -> str | None:
    return None if config.hub is None else config.hub.repository
