"""The calibration job: find and verify a SkipConfig that stays within a budget on a user's model and data.

The search uses one part of the images, and its result is verified on the other part. The config that looks
best among many is partly lucky, so its score on the data that selected it is too good.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import skipvision as sv
from pipelines.calibrate.accuracy import ByAccuracy
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.layers.strategy import ByLayers
from pipelines.calibrate.search import NothingWithinBudgetError
from pipelines.calibrate.strategy import Search, Strategy
from pipelines.cluster.resources import node_resources, worker_resources
from pipelines.cluster.session import check_ray_address, ray_session
from pipelines.engines.model import EngineModel, check_generation, find_model, insist_on_same_adapter
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from pipelines.shared.folder import JobFolder
from pipelines.tracking.run import Tracker
from pipelines.tracking.tracked import finished_result, tracked_run


class CalibrationFolder(JobFolder):
    """The folder of the calibration ``name`` under ``storage``, new or continued."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"scaling", "storage", "engine", "tracking"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.downloads = self.path / "adapter"
        self.scores = self.path / "scores"
        self.skip = self.path / "skip.yaml"

    @property
    def has_work(self) -> bool:
        return bool({"latency", "divergences", "evidence"} & self.state.keys()) or (
            self.scores.exists() and any(self.scores.iterdir())
        )


def run_calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Run, continue, record or only report the job ``config.name``, and return its result.

    Raises:
        NothingWithinBudgetError: the budget is too tight for the space, or the data are too few to decide.
        ConfigError: the settings contradict each other, the model, the data or the first start.
        DataError: the questions cannot be read, split or answered.
        ResourceError: the cluster is too small.
        TrackingError: MLflow cannot be reached, or does not accept the results.
    """
    folder = CalibrationFolder(config.storage_path, config.name)
    with folder.claimed():
        folder.resume(config)
        config.resolved()  # raises for missing paths; the model keeps its path as given
        check_ray_address()
        inputs = _read(config, folder)
        result = finished_result(config, folder, folder.path)
        finished = result is not None
        if result is None:
            result = _complete(config, folder, inputs)
            folder.remember(result=result)
        say(Path(result["table"]).read_text())
    if result["chosen"] is None:
        best = json.dumps(result["best"])
        raise NothingWithinBudgetError(
            f"{result['reason']}; the best found is {best}. Evidence: {result['evidence']}"
        )
    return {**result, "already_finished": finished}


@dataclass(frozen=True)
class _Inputs:
    """The model, the strategy with its data, and the fingerprints of both."""

    model: EngineModel
    strategy: Strategy
    files: dict[str, str]


def _read(config: CalibrateConfig, folder: CalibrationFolder) -> _Inputs:
    """Read model and data, and check that they are those of the job's first start."""
    uri = config.tracking.absolute_uri(folder.storage)
    known = folder.state.get("adapter")
    if folder.state.get("result"):
        insist_on_same_adapter(config.model, uri, known)
    model = find_model(config, uri, folder.downloads, known)
    strategy: Strategy = (ByLayers if config.strategy == "layers" else ByAccuracy)(config, model)
    files = strategy.files()
    folder.require_same_files(files)
    return _Inputs(model, strategy, files)


def _complete(config: CalibrateConfig, folder: CalibrationFolder, inputs: _Inputs) -> dict[str, Any]:
    """Search, unless that is done, record the evidence and return the result."""
    evidence: Any = folder.state.get("evidence")
    strategy = inputs.strategy
    search: Search | None = None
    if evidence is None:  # mistakes are reported before an MLflow run starts
        for line in strategy.facts():
            say(line)
        check_generation(inputs.model.base)
        search = strategy.prepare()
    folder.hold(adapter=inputs.model.adapter_label, files=inputs.files)
    settings = config.model_dump(mode="json")
    # Ray is left after the MLflow run has ended, because stopping it takes seconds.
    with ExitStack() as ray, tracked_run(config, folder, settings, settings) as run:
        if search is not None:
            scaling = config.scaling
            ray.enter_context(ray_session())
            resources = worker_resources(
                node_resources(), scaling.workers, scaling.cpus_per_worker, scaling.gpus_per_worker
            )
            evidence = search(folder, resources)
            folder.remember(evidence=evidence)
        run.advice = (
            f"The evidence is complete in {folder.path}. Run the same job again to record it; nothing is "
            "measured twice"
        )
        return _record(evidence, strategy, folder, run)


def _record(
    evidence: dict[str, Any], strategy: Strategy, folder: CalibrationFolder, run: Tracker
) -> dict[str, Any]:
    """Write evidence, table, figure and the chosen SkipConfig to the folder and to MLflow.

    Returns the job's result.
    """
    files = {name: folder.path / name for name in ("evidence.json", "calibration.md", "calibration.png")}
    write_text(files["evidence.json"], json.dumps(evidence, indent=2) + "\n")
    write_text(files["calibration.md"], strategy.markdown(evidence))
    strategy.figure(evidence, files["calibration.png"])
    if evidence["chosen"] is not None:
        files["skip.yaml"] = folder.skip
        write_text(folder.skip, sv.SkipConfig(**evidence["chosen"]).to_yaml())
        run.metrics({**strategy.metrics(evidence), **evidence["costs"]}, 0)
    for file in files.values():
        run.store(file)
    return {
        **{key: evidence[key] for key in ("chosen", "costs", "best", "reason")},
        "skip": str(folder.skip) if evidence["chosen"] is not None else None,
        "evidence": str(files["evidence.json"]),
        "table": str(files["calibration.md"]),
        "picture": str(files["calibration.png"]),
        "mlflow_uri": run.uri,
        "mlflow_run_id": run.run_id,
    }
