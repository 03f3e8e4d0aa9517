"""Calibration: the SkipConfig that keeps to a budget on a user's model and data, found and verified.

The search sees one part of the images. What it finds is verified on the other: of many configs the one that
looks best has also been lucky, and its score on the questions that chose it is too good.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import skipvision as sv
from pipelines.calibrate_config import CalibrateConfig
from pipelines.calibrate_report import markdown, picture
from pipelines.calibrate_scoring import scorers
from pipelines.calibrate_search import Calibration, NothingWithinBudgetError
from pipelines.calibrate_space import candidates, parts
from pipelines.caption_model import check_model, find_model
from pipelines.cluster import node_resources, ray_session, worker_resources
from pipelines.fingerprints import of_files
from pipelines.paths import output_path
from pipelines.run_folder import RunFolder
from pipelines.tracking import Tracker, TrackingError

__all__ = ["CalibrateConfig", "run_calibrate"]


class CalibrationFolder(RunFolder):
    """Job ``name`` under ``storage``, new or continued."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"scaling", "storage", "engine", "tracking"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.downloads = self.path / "adapter"
        self.scores = self.path / "scores"
        self.skip = self.path / "skip.yaml"

    @property
    def begun(self) -> bool:
        return "latency" in self.state or (self.scores.exists() and any(self.scores.iterdir()))


def run_calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Search, or go on, or only report the job ``config.name``; returns its evidence.

    Raises:
        NothingWithinBudgetError: the budget is too tight for the space, or the data too few to tell.
        ConfigError: settings that contradict each other, the model, the data or an earlier start.
        DataError: rows that cannot be asked.
        ResourceError: the cluster is too small.
        TrackingError: MLflow cannot be reached.
    """
    folder = CalibrationFolder(output_path(config.storage, "storage"), config.name)
    with folder.claimed():
        if not folder.resumes(config.model_dump(mode="json")):
            folder.state = {}
        if "result" not in folder.state:
            _search(config, folder)
        result: dict[str, Any] = folder.state["result"]
        print(Path(result["table"]).read_text(), flush=True)
    if result["chosen"] is None:
        best = json.dumps(result["best"])
        raise NothingWithinBudgetError(
            f"{result['reason']}; the best found is {best}. Evidence: {result['evidence']}"
        )
    return result


def _search(config: CalibrateConfig, folder: CalibrationFolder) -> None:
    uri = config.tracking.absolute_uri(folder.storage)
    model = find_model(config, uri, folder.downloads, folder.state.get("adapter"))
    model_config = check_model(model)
    search, held_out = parts(config)
    both = replace(search, questions=(*search.questions, *held_out.questions))
    files = of_files([both], [model])
    folder.insist_on_same(files)
    found = candidates(config, model, model_config, search)
    # Call by call, an engine can be asked for the summaries that it has, or for none.
    model = replace(model, skip=max((one.skip for one in found), key=lambda skip: skip.summary_tokens))
    known = folder.state.get("mlflow_run_id")
    tracker = Tracker.start(
        uri,
        experiment=config.tracking.experiment,
        run_name=config.name,
        artifacts=folder.storage / "mlflow-artifacts",
        run_id=known,
    )
    if known is None:
        tracker.parameters(config.model_dump(mode="json"))
    folder.remember(
        config=config.model_dump(mode="json"),
        adapter=model.adapter_label,
        files=files,
        mlflow_run_id=tracker.run_id,
    )
    try:
        with ray_session():
            scaling = config.scaling
            resources = worker_resources(
                node_resources(), scaling.workers, scaling.cpus_per_worker, scaling.gpus_per_worker
            )
            with scorers(
                model,
                config.engine,
                config.data.max_new_tokens,
                workers=scaling.workers,
                resources=resources,
            ) as have_done:
                evidence = Calibration(config, folder, have_done, search, held_out).run(found)
    except BaseException:
        with suppress(TrackingError):
            tracker.finish("FAILED")
        raise
    _hand_in(evidence, folder, tracker)


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
        found = evidence["verdict"]["found"]
        numbers = {key: found[key] for key in ("difference", "low", "high")}
        tracker.metrics({**numbers, **evidence["costs"]}, 0)
    for file in files.values():
        tracker.store(file)
    tracker.close()
    tracker.finish("FINISHED")
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
