"""The MLflow runs of a job: started or resumed with it, and ended with it.

A run ends FINISHED when its block succeeds, FAILED when the block raises an error, and KILLED when the job is
stopped by a signal. A job that is resumed continues its run, unless a setting in ``tracking`` has changed:
then a new run starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.shared.console import say
from pipelines.shared.folder import JobFolder
from pipelines.tracking.client import TrackingError
from pipelines.tracking.config import TrackedConfig
from pipelines.tracking.run import Tracker


def finished_result(config: TrackedConfig, folder: JobFolder, files: Path) -> dict[str, Any] | None:
    """Report that a job is finished and return its result; None if work or recording is left.

    A job whose tracking settings have changed has to be recorded again.

    Args:
        config: the settings.
        folder: the claimed folder.
        files: where the job's files are, for the message.
    """
    result: dict[str, Any] | None = folder.state.get("result")
    if not result or not same_tracking(config, folder):
        return None
    say(f"job {folder.name!r} is finished already: {files}")
    return result


def same_tracking(config: TrackedConfig, folder: JobFolder) -> bool:
    """Return whether the job's runs were started with the same tracking settings."""
    return folder.state.get("tracked_in") in (None, config.tracking.model_dump(mode="json"))


@contextmanager
def tracked_run(
    config: TrackedConfig,
    folder: JobFolder,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> Iterator[Tracker]:
    """Start or resume a job's run, and end it when the block ends.

    The settings and ``mlflow_run_id`` are written to ``run.json``.

    Args:
        config: the settings as the user gave them.
        folder: the claimed folder.
        settings: ``config.yaml`` of a new run.
        parameters: parameters of a new run.

    Raises:
        TrackingError: MLflow does not answer. The message ends with `Tracker.advice`.
    """
    known = folder.state.get("mlflow_run_id") if same_tracking(config, folder) else None
    with _job_run(config, folder, config.name, known, settings, parameters) as run:
        _remember(config, folder, mlflow_run_id=run.run_id)
        yield run


@contextmanager
def tracked_runs(
    config: TrackedConfig,
    folder: JobFolder,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
) -> Iterator[Mapping[str, Tracker]]:
    """Like `tracked_run`, with one run for each label in ``parameters``, named ``<job>.<label>``.

    The settings and ``mlflow_run_ids`` are written to ``run.json``.
    """
    known = dict(folder.state.get("mlflow_run_ids") or {}) if same_tracking(config, folder) else {}
    with ExitStack() as stack:
        runs = {}
        for label, own in parameters.items():
            name = f"{config.name}.{label}"
            run = _job_run(config, folder, name, known.get(label), settings, own)
            runs[label] = stack.enter_context(run)
            known[label] = runs[label].run_id
            _remember(config, folder, mlflow_run_ids=known)
        yield runs


def _remember(config: TrackedConfig, folder: JobFolder, **runs: Any) -> None:
    # The result is cleared: the job counts as finished again when these runs have recorded it.
    folder.remember_settings(config, tracked_in=config.tracking.model_dump(mode="json"), result=None, **runs)


@contextmanager
def _job_run(
    config: TrackedConfig,
    folder: JobFolder,
    name: str,
    known: str | None,
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> Iterator[Tracker]:
    run = Tracker.start(
        config.tracking.absolute_uri(folder.storage),
        experiment=config.tracking.experiment,
        run_name=name,
        artifacts=folder.storage / "mlflow-artifacts",
        run_id=known,
    )
    with ended(run):
        if known is None:
            run.describe(settings, parameters)
        yield run


@contextmanager
def ended(run: Tracker) -> Iterator[Tracker]:
    """End ``run`` when the block ends: FINISHED, FAILED after an error, KILLED after a signal.

    Raises:
        TrackingError: MLflow does not answer or lacks values. The message ends with `Tracker.advice`.
    """
    try:
        yield run
        run.finish("FINISHED")
    except BaseException as error:
        with suppress(TrackingError):
            # The status comes first: a process that stops a job may kill it a few seconds later.
            run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        run.close()
        if isinstance(error, TrackingError) and run.advice and run.advice not in str(error):
            raise type(error)(f"{error}\n{run.advice}") from error
        raise
