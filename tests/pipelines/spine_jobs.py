"""The table of jobs that `test_spine` runs through its scenarios: settings, and how to disturb each job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import skipvision as sv
from pipelines.evaluation.items import Item, write_items
from pipelines.finetune.config import FinetuneConfig
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.run import Tracker

SKIP = {"retained": 4, "skipped": 4}


@dataclass(frozen=True)
class Job:
    """A job as the table's scenarios need it.

    Attributes:
        settings: what its YAML file holds, apart from name, storage and experiment.
        midway: shows that some work is done: a pattern of files below the job's folder, or
            ``module:name`` of a function that is called in the middle of the job.
        ends: states of its MLflow runs after SIGTERM and after SIGKILL.
        work: creates in the job's folder what an earlier start would have left.
        data: changes the data that the job reads; returns what the error must name.
        slow: scenarios that take more than a few seconds.
    """

    settings: Callable[[Inputs], dict[str, Any]]
    midway: str
    ends: tuple[set[str], set[str]] = ({"KILLED"}, {"RUNNING"})
    work: Callable[[Path], object] = lambda _: None
    data: Callable[[Inputs], str] = lambda _: ""
    slow: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Inputs:
    """Files that jobs read, in a folder that one test may change."""

    folder: Path
    model: Path
    data: Path
    adapter: Path
    storage: Path

    @property
    def uri(self) -> str:
        return TrackingConfig().absolute_uri(self.storage)

    @property
    def questions(self) -> Path:
        return self.folder / "questions.tsv"


def finetune(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": {"path": str(inputs.model)},
        "data": {"train": str(inputs.data / "train.json"), "check_images": "none"},
        "lora": {"rank": 2},
        "skip": SKIP,
        "training": {"max_steps": 12, "batch_size": 2, "checkpoint_every": 2, "precision": "float32"},
        "tracking": {"registered_model": None, "system_metrics_seconds": 0},
        "scaling": {"cpus_per_worker": 1},
    }


def caption(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": {"path": str(inputs.model), "adapter": str(inputs.adapter), "dtype": "float32"},
        "input": {"source": str(inputs.data / "images"), "limit": 12},
        "sampling": {"max_new_tokens": 4},
        "output": {"shard_rows": 3},
        "samples": 1,
        "scaling": {"cpus_per_worker": 1},
    }


def score(inputs: Inputs) -> dict[str, Any]:
    return {
        "systems": {"full": {"model": {"path": str(inputs.model), "dtype": "float32"}}},
        "datasets": [{"name": "mine", "path": str(inputs.questions), "rule": "exact"}],
        "sampling": {"max_new_tokens": 4},
        "shard_rows": 2,
        "resamples": 100,
        "scaling": {"cpus_per_worker": 1},
    }


def calibrate(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": {"path": str(inputs.model), "dtype": "float32"},
        "data": {"name": "mine", "path": str(inputs.questions), "rule": "exact", "max_new_tokens": 2},
        "space": {"retained": [2, 4], "skipped": [0]},
        "budget": {"accuracy_drop": 0.99},
        "search": {"rungs": 1, "finalists": 1},
        "scaling": {"cpus_per_worker": 1},
    }


def promote(inputs: Inputs) -> dict[str, Any]:
    """One version of a model, judged by items of its own against full tokens."""
    common = {"model": "base", "weights": "w", "sampling": "greedy", "judge": None}
    systems = {
        "full": {**common, "adapter": None, "skip": sv.SkipConfig.full().model_dump_json()},
        "new": {**common, "adapter": "models:/ours/1", "skip": sv.SkipConfig(**SKIP).model_dump_json()},
    }
    items = [Item("d", str(n), name, "", str(n), "", 1.0) for name in systems for n in range(200)]
    write_items(inputs.folder / "items.parquet", items, systems)
    file = {"items": str(inputs.folder / "items.parquet")}
    return {
        "candidate": {"model": "models:/ours/1", **file},
        "reference": {"against": "full", **file},
        "alias": "spine",
        "budget": {"overall": 0.1},
    }


def analyse(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": {"path": str(inputs.model)},
        "data": str(inputs.data / "validation.json"),
        "skip": {"retained": 4},
        "ratio_rows": 2,
        "bound_rows": 1,
        "worst_case": False,
        "threads": 1,
    }


def compare(inputs: Inputs) -> dict[str, Any]:
    """Two finished fine-tuning runs, of which only the second skips."""
    names = {}
    for kind, skip in (("full", None), ("skip", SKIP)):
        names[kind] = name = f"{kind}-{inputs.folder.parent.name}"
        settings = {**finetune(inputs), "name": name, "storage": str(inputs.storage), "skip": skip}
        config = FinetuneConfig.model_validate(settings).model_dump(mode="json")
        adapter = inputs.storage / name / "adapter"
        shutil.copytree(
            inputs.adapter if skip else inputs.folder / "full_adapter", adapter, dirs_exist_ok=True
        )
        artifacts = inputs.storage / "mlflow-artifacts"
        tracker = Tracker.start(inputs.uri, experiment="spine", run_name=name, artifacts=artifacts)
        tracker.finish("FINISHED")
        result = {
            "adapter": str(adapter),
            "seconds_per_step": 1.0,
            "training_seconds": 9.0,
            "mlflow_uri": inputs.uri,
            "mlflow_run_id": tracker.run_id,
        }
        (inputs.storage / name / "run.json").write_text(json.dumps({"config": config, "result": result}))
    return {
        **names,
        "test": str(inputs.data / "test.json"),
        "max_new_tokens": 2,
        "untuned": False,
        "threads": 1,
    }


def export(inputs: Inputs) -> dict[str, Any]:
    return {"model": {"path": str(inputs.model), "adapter": str(inputs.adapter)}}


def tradeoff(inputs: Inputs) -> dict[str, Any]:
    return {
        "model": {"path": str(inputs.model)},
        "test": str(inputs.data / "test.json"),
        "methods": ["random"],
        "fractions": [0.8],
        "grid": {"retained": [2], "skipped": [0, 3]},
        "max_new_tokens": 2,
        "latency_rounds": 0,
        "cpus_per_task": 1,
    }


def change_row(inputs: Inputs) -> str:
    file = inputs.data / "train.json"
    rows = json.loads(file.read_text())
    rows[7]["conversations"][1]["value"] = "something else"
    file.write_text(json.dumps(rows))
    return "train.json has changed since run"


def change_answer(inputs: Inputs) -> str:
    inputs.questions.write_text(inputs.questions.read_text().replace("\tred\n", "\tblue\n", 1))
    return "dataset mine has changed since this job began"


def change_adapter(inputs: Inputs) -> str:
    (inputs.adapter / "note").write_text("trained further")
    return "adapter has changed since this job began"


def touch(name: str) -> Callable[[Path], object]:
    def create(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    return create


STARTED = frozenset({"stop", "kill", "finished", "tracking"})
JOBS = {
    "finetune": Job(
        finetune,
        midway="checkpoints/checkpoint_manager_snapshot.json",
        work=touch("checkpoints/checkpoint_00000002/state.pt"),
        data=change_row,
        slow=STARTED,
    ),
    "caption": Job(
        caption,
        midway="captions/0*",
        work=touch("captions/000000.parquet"),
        data=change_adapter,
        slow=STARTED,
    ),
    "score": Job(
        score,
        midway="answers/*/*/captions/0*",
        work=touch("answers/full/x"),
        data=change_answer,
        slow=STARTED,
    ),
    "calibrate": Job(
        calibrate, midway="scores/*", work=touch("scores/x.parquet"), data=change_answer, slow=STARTED
    ),
    "promote": Job(promote, midway="pipelines.promote.job:_decide", slow=frozenset({"kill"})),
    "analyse": Job(analyse, midway="pipelines.analyse.job:_measure", slow=frozenset({"stop", "kill"})),
    "compare": Job(
        compare,
        midway="pipelines.compare.job:_answers",
        ends=({"FINISHED"}, {"FINISHED"}),  # its runs are those of two fine-tunes that have ended
        slow=frozenset({"stop", "kill", "finished"}),
    ),
    "export": Job(
        export,
        midway="pipelines.export.job:_write",
        work=touch("model/config.json"),
        data=change_adapter,
        slow=frozenset({"stop", "kill"}),
    ),
    "tradeoff": Job(tradeoff, midway="points/*.parquet", ends=(set(), set()), slow=STARTED),
}
NOT_APPLICABLE = {
    **{("address", name): "it uses no Ray" for name in ("promote", "analyse", "compare", "export")},
    ("data", "analyse"): "it measures everything in one go, so that no results can mix",
    ("data", "promote"): "one decision has no earlier work",
    ("finished", "promote"): "a candidate that has the alias is refused: there is nothing to decide",
    ("tracking", "promote"): "every decision is a run of its own",
    ("data", "compare"): "it evaluates in one go, and again if the rows have changed",
    ("tracking", "compare"): "it records in the runs of the fine-tunes",
    ("away", "tradeoff"): "it records nothing in MLflow",
    ("tracking", "tradeoff"): "it records nothing in MLflow",
    ("finished", "tradeoff"): "each of its points is finished by itself",
    ("data", "tradeoff"): "its files are named by the contents of all that they depend on",
}
