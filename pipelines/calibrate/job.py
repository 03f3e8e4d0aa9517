"""Calibration: the SkipConfig that keeps to a budget on a user's model and data, found and verified.

The search sees one part of the images. What it finds is verified on the other: of many configs the one that
looks best has also been lucky, and its score on the questions that chose it is too good.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import skipvision as sv
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import Candidate
from pipelines.calibrate.report import markdown, picture
from pipelines.calibrate.search import Calibration, NothingWithinBudgetError
from pipelines.calibrate.space import candidates, parts
from pipelines.calibrate.workers import scorers
from pipelines.cluster.resources import node_resources, worker_resources
from pipelines.cluster.session import ray_session
from pipelines.engines.model import EngineModel, check_model, find_model, insist_on_same_adapter
from pipelines.score.dataset import Dataset
from pipelines.score.fingerprints import of_files
from pipelines.shared.folder import JobFolder
from pipelines.shared.paths import output_path
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker

__all__ = ["CalibrateConfig", "run_calibrate"]


class CalibrationFolder(JobFolder):
    """Job ``name`` under ``storage``, new or continued."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"scaling", "storage", "engine", "tracking"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.downloads = self.path / "adapter"
        self.scores = self.path / "scores"
        self.skip = self.path / "skip.yaml"

    @property
    def begun(self) -> bool:
        return bool({"latency", "evidence"} & self.state.keys()) or (
            self.scores.exists() and any(self.scores.iterdir())
        )


def run_calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Search, or go on, or only record or report the job ``config.name``; returns its evidence.

    Raises:
        NothingWithinBudgetError: the budget is too tight for the space, or the data too few to tell.
        ConfigError: settings that contradict each other, the model, the data or an earlier start.
        DataError: rows that cannot be asked.
        ResourceError: the cluster is too small.
        TrackingError: MLflow cannot be reached, or does not take the results.
    """
    folder = CalibrationFolder(output_path(config.storage, "storage"), config.name)
    with folder.claimed():
        if not folder.resumes(config.model_dump(mode="json")):
            folder.state = {}
        found = _found(config, folder)
        if folder.state.get("result") and folder.tracks(config.tracking):
            print(f"job {folder.finished_already(config.tracking, folder.path)}", flush=True)
        else:
            _complete(config, folder, found)
        result: dict[str, Any] = folder.state["result"]
        print(Path(result["table"]).read_text(), flush=True)
    if result["chosen"] is None:
        best = json.dumps(result["best"])
        raise NothingWithinBudgetError(
            f"{result['reason']}; the best found is {best}. Evidence: {result['evidence']}"
        )
    return result


@dataclass(frozen=True)
class _Found:
    """What a search is about."""

    uri: str
    model: EngineModel
    whole: Dataset
    search: Dataset
    held_out: Dataset
    files: dict[str, str]


def _found(config: CalibrateConfig, folder: CalibrationFolder) -> _Found:
    """Read model and questions and insist that they are what an earlier start has read."""
    uri = config.tracking.absolute_uri(folder.storage)
    known = folder.state.get("adapter")
    if folder.state.get("result"):
        insist_on_same_adapter(config.model, uri, known)
    model = find_model(config, uri, folder.downloads, known)
    search, held_out = parts(config)
    whole = replace(search, questions=(*search.questions, *held_out.questions))
    files = of_files([whole], [model])
    folder.insist_on_same(files)
    return _Found(uri, model, whole, search, held_out, files)


def _complete(config: CalibrateConfig, folder: CalibrationFolder, about: _Found) -> None:
    """Search, unless that is done, and hand in what was found."""
    evidence = folder.state.get("evidence")
    space = [] if evidence else _space(config, about)
    tracker = _start_tracking(config, folder, about)
    try:
        if evidence is None:
            evidence = _search(config, folder, about, space)
            folder.remember(evidence=evidence)
        _hand_in(evidence, folder, tracker)
    except BaseException:
        with suppress(TrackingError):
            tracker.finish("FAILED")
        raise


def _space(config: CalibrateConfig, about: _Found) -> list[Candidate]:
    """What is searched; whatever is wrong with it or the model is said before a run is begun."""
    for line in about.whole.facts():
        print(line, flush=True)
    return candidates(config, about.model, check_model(about.model), about.search)


def _start_tracking(config: CalibrateConfig, folder: CalibrationFolder, about: _Found) -> Tracker:
    known = folder.tracked(config.tracking, "mlflow_run_id")
    tracker = Tracker.start(
        about.uri,
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=folder.storage / "mlflow-artifacts",
        run_id=known,
    )
    if known is None:
        tracker.parameters(config.model_dump(mode="json"))
    folder.remember_tracked(
        config.tracking,
        config=config.model_dump(mode="json"),
        adapter=about.model.adapter_label,
        files=about.files,
        mlflow_run_id=tracker.run_id,
        result=None,
    )
    return tracker


def _search(
    config: CalibrateConfig, folder: CalibrationFolder, about: _Found, space: Sequence[Candidate]
) -> dict[str, Any]:
    """The evidence, out of processes that are started for it."""
    # Call by call, an engine can be asked for the summaries that it has, or for none.
    skip = max((one.skip for one in space), key=lambda skip: skip.summary_tokens)
    scaling, tokens = config.scaling, config.data.max_new_tokens
    with ray_session():
        resources = worker_resources(
            node_resources(), scaling.workers, scaling.cpus_per_worker, scaling.gpus_per_worker
        )
        model = replace(about.model, skip=skip)
        with scorers(model, config.engine, tokens, workers=scaling.workers, resources=resources) as run_tasks:
            return Calibration(config, folder, run_tasks, about.search, about.held_out).run(space)


def _hand_in(evidence: dict[str, Any], folder: CalibrationFolder, tracker: Tracker) -> None:
    """Into the job's folder and MLflow: evidence, table, picture and, if there is one, the SkipConfig."""
    files = {name: folder.path / name for name in ("evidence.json", "calibration.md", "calibration.png")}
    config = CalibrateConfig.model_validate(folder.state["config"])
    files["evidence.json"].write_text(json.dumps(evidence, indent=2) + "\n")
    files["calibration.md"].write_text(markdown(evidence, config.budget))
    picture(evidence, config.budget, files["calibration.png"])
    if evidence["chosen"] is not None:
        files["skip.yaml"] = folder.skip
        folder.skip.write_text(sv.SkipConfig(**evidence["chosen"]).to_yaml())
        verdict = evidence["verdict"]
        numbers = {
            "difference": verdict["found"]["difference"],
            "low": verdict["worst"],
            "high": verdict["best"],
        }
        tracker.metrics({**numbers, **evidence["costs"]}, 0)
    try:
        for file in files.values():
            tracker.store(file)
        tracker.finish("FINISHED")
    except TrackingError as error:
        raise TrackingError(
            f"{error}\nThe evidence is complete in {folder.path}. Run the same job again to record it; "
            "nothing is asked twice"
        ) from error
    folder.remember(
        result={
            **{key: evidence[key] for key in ("chosen", "costs", "best", "reason")},
            "skip": str(folder.skip) if evidence["chosen"] is not None else None,
            "evidence": str(files["evidence.json"]),
            "table": str(files["calibration.md"]),
            "picture": str(files["calibration.png"]),
            "mlflow_uri": tracker.uri,
            "mlflow_run_id": tracker.run_id,
        }
    )
