"""Calibration on a real local Ray: the result is verified and recorded, and nothing is evaluated twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.calibrate import accuracy
from pipelines.calibrate import job as calibrate
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import Candidate
from pipelines.calibrate.job import run_calibrate
from pipelines.calibrate.search import Calibration, NothingWithinBudgetError
from pipelines.calibrate.space import combinations, parts
from pipelines.calibrate.workers import Scorer, Task
from pipelines.evaluation.items import Item, read_items
from pipelines.score.benchmarks import find_benchmark
from pipelines.score.dataset import Dataset, Question
from pipelines.score.points import Prediction, score_answers
from pipelines.shapes.files import ShapesConfig, write_shapes
from pipelines.shared.folder import JobFolder
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, DataError
from tests.pipelines.tracking.test_run import no_metrics

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images, six questions each."""
    folder = tmp_path_factory.mktemp("questions")
    write_shapes(ShapesConfig(output=folder, train=1, validation=1, test=4, tsv=True))
    return folder / "test.tsv"


@pytest.fixture(scope="module")
def settings(questions: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The random model has no answer right, so no config loses anything against full tokens."""
    return {
        "name": "job",
        "storage": str(tmp_path_factory.mktemp("runs")),
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"name": "Shapes", "path": str(questions), "max_new_tokens": 2},
        "space": {"retained": [2, 4, 12], "skipped": [0, 4]},
        "budget": {"accuracy_drop": 0.99, "kv_bytes": 0.9, "latency": 1e4},  # on a busy machine too
        "search": {"rungs": 2, "factor": 2, "finalists": 2, "latency_questions": 2},
        "tracking": {"experiment": "tests"},
        "scaling": {"workers": 2, "cpus_per_worker": 1},
    }


def changed(settings: dict[str, Any], **sections: Any) -> CalibrateConfig:
    return CalibrateConfig.model_validate({**settings, **sections})


@pytest.mark.slow
def test_the_cheapest_is_found_verified_recorded_and_continued(settings, local_ray, capsys, monkeypatch):
    result = run_calibrate(changed(settings))
    folder = Path(settings["storage"]) / "job"
    chosen = SkipConfig.from_yaml((folder / "skip.yaml").read_text())
    assert chosen == SkipConfig(**result["chosen"]) == SkipConfig(retained=2, skipped=0)
    evidence = json.loads((folder / "evidence.json").read_text())
    stages = [one["stage"] for one in evidence["history"]]
    assert stages == ["rung 1"] * 5 + ["rung 2"] * 3 + ["held out"] * 2  # the sixth config is over kv_bytes
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "Chosen: retained 2, skipped 0" in capsys.readouterr().out
    tracked = Tracker(result["mlflow_uri"], result["mlflow_run_id"])._client
    assert tracked.get_run(result["mlflow_run_id"]).data.metrics["latency"] > 0
    files = {file.path for file in tracked.list_artifacts(result["mlflow_run_id"])}
    assert files == {"config.yaml", "skip.yaml", "evidence.json", "calibration.md", "calibration.png"}
    seen = {part: _groups(folder, part) for part in ("rung-0", "rung-1", "held-out")}
    assert not seen["held-out"] & (seen["rung-0"] | seen["rung-1"])
    assert len(seen["rung-0"] | seen["rung-1"] | seen["held-out"]) == 4

    # A killed job leaves some files of scores and no evidence. Only the missing scores are computed.
    state = json.loads((folder / "run.json").read_text())
    del state["result"], state["evidence"]
    (folder / "run.json").write_text(json.dumps(state))
    written = {file: file.stat().st_mtime_ns for file in (folder / "scores").iterdir()}
    next(iter(written)).unlink()
    fewer = changed(settings, scaling={"workers": 1, "cpus_per_worker": 1})
    with (
        no_metrics(result["mlflow_uri"]),
        pytest.warns(UserWarning, match="does not take metrics"),
        pytest.raises(TrackingError, match=r"did not take .*\n.*Run the same job again to record it"),
    ):
        run_calibrate(fewer)
    assert tracked.get_run(result["mlflow_run_id"]).info.status == "FAILED"
    monkeypatch.setattr(calibrate, "ray_session", lambda: 1 / 0)  # only recording is left
    again = run_calibrate(fewer)
    assert again == result
    assert tracked.get_run(result["mlflow_run_id"]).info.status == "FINISHED"
    elsewhere = run_calibrate(changed(settings, tracking={"experiment": "elsewhere"}))
    run = tracked.get_run(elsewhere["mlflow_run_id"])
    assert tracked.get_experiment(run.info.experiment_id).name == "elsewhere"
    assert run.data.metrics == tracked.get_run(result["mlflow_run_id"]).data.metrics
    assert {**elsewhere, "mlflow_run_id": result["mlflow_run_id"]} == result
    times = [file.stat().st_mtime_ns != before for file, before in written.items()]
    assert times == [True] + [False] * (len(times) - 1)
    with pytest.raises(ConfigError, match=r"exists in .* with other settings"):
        run_calibrate(changed(settings, budget={"accuracy_drop": 0.5}))


def _groups(folder: Path, part: str) -> set[str]:
    files = (folder / "scores").glob(f"{part}-*.parquet")
    return {item.group for file in files for item in read_items(file)}


@pytest.fixture
def in_process(monkeypatch):
    """A scorer in this process: workers take half a minute to start, and the first test covers them."""

    @contextmanager
    def scorers(*arguments: Any, workers: int, resources: Any) -> Iterator[Any]:
        scorer = Scorer(*arguments)
        yield lambda tasks: ((task, scorer.do(0, task)[1]) for task in tasks)

    monkeypatch.setattr(accuracy, "scorers", scorers)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "in_process")
def test_a_config_without_sufficient_evidence_is_not_chosen(settings):
    """Twelve questions about two images cannot show a drop of five points or less."""
    config = changed(
        settings,
        name="strict",
        space={"retained": [4]},
        budget={"accuracy_drop": 0.05},
        search={"rungs": 1},
    )
    with pytest.raises(
        NothingWithinBudgetError, match=r"about 432 items would be needed to decide.*\"retained\": 4"
    ):
        run_calibrate(config)
    folder = Path(settings["storage"]) / "strict"
    assert not (folder / "skip.yaml").exists()
    assert "Nothing was chosen" in (folder / "calibration.md").read_text()
    with pytest.raises(NothingWithinBudgetError):  # the finished job only reports
        run_calibrate(config)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "in_process")
def test_configs_that_are_too_slow_are_recorded_with_their_latency(settings):
    config = changed(settings, name="slow", space={"retained": [4]}, budget={"latency": 1e-6})
    with pytest.raises(NothingWithinBudgetError, match=r"first token to 1e-06 .*\"latency\": \d+\.\d+"):
        run_calibrate(config)
    folder = Path(settings["storage"]) / "slow"
    (one,) = json.loads((folder / "evidence.json").read_text())["history"]
    assert (one["stage"], one["items"], one["costs"]["latency"] > 0) == ("latency", 0, True)
    assert "| latency | 4 |" in (folder / "calibration.md").read_text()
    assert (folder / "calibration.png").exists()
    assert list((folder / "scores").glob("*")) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": {"kv_bytes": 0.001}}, NothingWithinBudgetError, "the cheapest costs"),
        ({"space": {"retained": [0], "skipped": [0]}}, ConfigError, "no combination of values is valid"),
        ({"data": {"name": "Shapes", "path": "nowhere.tsv"}}, ConfigError, "nowhere.tsv"),
        ({"space": {"probe_layer": [7]}}, ConfigError, "probe_layer"),
        ({"space": {"summary_tokens": [0, 1, 2]}}, ConfigError, r"= \[1, 2\]: a model supports one number"),
    ],
)
def test_unusable_settings_are_reported_before_ray_starts(settings, changes, error, message):
    with pytest.raises(error, match=message):
        run_calibrate(changed(settings, name="wrong", **changes))


def test_a_cheap_config_that_loses_accuracy_is_not_chosen(settings, tmp_path):
    """The cheap config is wrong about every fifth image, the expensive one about none."""
    config = changed(settings, budget={"accuracy_drop": 0.05}, search={"rungs": 1, "finalists": 1})
    expensive, cheap = (
        Candidate(str(n), SkipConfig(retained=n), {"prefill_flops": n / 16, "kv_bytes": n / 16})
        for n in (12, 4)
    )
    rule = find_benchmark("Shapes", None)
    questions = [Question(str(n), str(n), "", str(n), {"answer": "x"}) for n in range(400)]
    search, held_out = (Dataset("Shapes", "", rule, "", tuple(questions[half::2])) for half in (0, 1))

    def run_tasks(tasks: Sequence[Task]) -> Iterator[tuple[Task, list[Item]]]:
        for task in tasks:
            every = 5 if task.skip == cheap.skip else 10**6
            wrong = {q.index for n, q in enumerate(task.dataset.questions) if n % every == every - 1}
            answers = {q.index: Prediction("y" if q.index in wrong else "x") for q in task.dataset.questions}
            yield task, score_answers(task.dataset, answers, task.system).items

    folder = JobFolder(tmp_path, "search")
    found = Calibration(config, folder, run_tasks, search, held_out).run([expensive, cheap])
    assert found["chosen"] == expensive.skip.model_dump()
    first = {one["name"]: one for one in found["history"] if one["stage"] == "rung 1"}
    assert first[cheap.name]["difference"] == pytest.approx(-0.2)
    assert first[cheap.name]["out"] == "drop certainly over the budget"


def test_one_image_cannot_be_split(settings, questions):
    config = changed(settings, data={"name": "Shapes", "path": str(questions), "limit": 6})
    with pytest.raises(DataError, match="1 images are too few"):
        parts(config)


def test_layers_can_be_searched():
    space = {"skip_layers": ["all", [0, 1]], "drop_after": [None, 1]}
    found = [(one.skip_layers, one.drop_after) for one in combinations(space, SkipConfig())]
    assert found == [("all", None), ("all", 1), ((0, 1), None), ((0, 1), 1)]


def test_invalid_combinations_are_left_out():
    space = {"skipped": [0, 4], "merge": ["pool", "drop"]}
    found = [(one.skipped, one.merge) for one in combinations(space, SkipConfig())]
    assert found == [(0, "drop"), (4, "pool"), (4, "drop")]


@pytest.mark.parametrize("wrong", [{"retain": [1]}, {"retained": []}, {}])
def test_an_empty_space_and_an_empty_budget_are_refused(settings, wrong):
    with pytest.raises(ValueError, match=r"not a field|no values|the space is empty"):
        changed(settings, space=wrong)
    with pytest.raises(ValueError, match="set at least one"):
        changed(settings, budget={"accuracy_drop": None})
