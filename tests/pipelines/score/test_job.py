"""Scoring on a real local Ray: two systems, a corrupt image, and a job that is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import skipvision as sv
from pipelines.evaluation.calibration import calibration
from pipelines.evaluation.items import Item, read_items, read_systems
from pipelines.promote.items import check_comparable
from pipelines.score import job as score
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import read_dataset
from pipelines.score.in_process import score_dataset
from pipelines.score.job import run_score
from pipelines.score.measures import measure, measures_metrics, measures_result, measures_table
from pipelines.score.points import Prediction, Scored, score_answers
from pipelines.score.report import compare, markdown, metrics
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError, DataError
from skipvision.integrations.lmms_eval.answering import load_engine
from tests.pipelines.score.tables import CHOICE, png, table
from tests.pipelines.tracking.test_run import no_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.timeout(300),
]
SKIP = {"retained": 4, "skipped": 4}


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tables")
    corrupt = png()[:40] + "AAAA" * 20 + png()[120:]
    rows = [
        {
            "index": n,
            "image": n % 2 if n > 1 else png(n),
            "question": f"{n}?",
            "answer": "Yes",
            "category": "random",
        }
        for n in range(8)
    ]
    rows[4]["image"] = corrupt
    rows[5]["answer"] = "maybe"
    rows[6]["image"] = ""
    table(folder / "star.tsv", [{"index": 1, "image": png(), **CHOICE}])
    return {
        "name": "scores",
        "storage": str(tmp_path_factory.mktemp("runs")),
        "systems": {
            "full": {"model": {"path": str(tiny_model), "dtype": "float32"}},
            "skip": {"model": {"path": str(tiny_model), "dtype": "float32"}, "skip": SKIP},
        },
        "datasets": [
            {"name": "POPE", "path": str(table(folder / "pope.tsv", rows)), "limit": 6},
        ],
        "sampling": {"max_new_tokens": 8},
        "engine": {"max_sequences": 4, "kv_budget_bytes": 2**22},
        "max_error_fraction": 0.5,
        "tracking": {"experiment": "tests"},
        "scaling": {"cpus_per_worker": 1},
    }


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], local_ray: None) -> dict[str, Any]:
    """The result of a job that was stopped once, after the first of its two systems."""
    rounds = []

    def stop_at_the_second(captioning: Any) -> dict[str, Any]:
        rounds.append(captioning.name)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return score_captioning(captioning)

    score_captioning = score.run_caption
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "run_caption", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run_score(ScoreConfig.model_validate(settings))
        first = len(rounds)
        file = Path(settings["datasets"][0]["path"])
        original = file.read_bytes()
        file.write_bytes(original.replace(b"Yes", b"No"))
        with pytest.raises(ConfigError, match="dataset POPE has changed since this job began"):
            run_score(ScoreConfig.model_validate(settings))
        file.write_bytes(original)
        patch.setattr(
            score, "run_caption", lambda given: (rounds.append(given.name), score_captioning(given))[1]
        )
        result = run_score(ScoreConfig.model_validate(settings))
    assert rounds[first:] == rounds[first - 1 : first] == ["scores.skip.POPE"]
    return result


def test_items_equal_those_of_an_engine_in_this_process(settings, finished, tiny_model):
    with load_engine(str(tiny_model), dtype="float32", **SKIP) as engine:
        for label, skip in (("full", "full"), ("skip", sv.SkipConfig(**SKIP))):
            expected = []
            for given in settings["datasets"]:
                dataset = read_dataset(given["name"], given["path"], limit=given.get("limit"))
                expected += score_dataset(engine, dataset, skip, system=label, max_new_tokens=8).items
            assert read_items(Path(finished["items"][label])) == expected
    full, skip = (read_systems(Path(finished["items"][label]))[label] for label in ("full", "skip"))
    assert skip["skip"] == sv.SkipConfig(**SKIP).model_dump_json()
    check_comparable(skip, full)


def test_unusable_rows_are_counted(finished):
    items = read_items(Path(finished["items"]["full"]))
    assert [item.index for item in items if item.error] == ["4", "5"]
    assert finished["errors"]["skip"] == {"POPE": 2}
    assert finished["left_out"] == {"POPE": {"without an image": 1}}
    report = Path(finished["table"]).read_text()
    assert "skip on POPE: 2 items have an error and count as wrong." in report
    assert "POPE: 1 rows are left out (1 without an image)." in report
    answers = Path(finished["table"]).parent / "answers" / "full" / "scores.full.POPE" / "captions"
    assert pq.read_table(answers)["key"].to_pylist() == ["0", "1", "2", "3", "4"]


def test_the_calibration_of_each_system_is_reported(finished):
    for label in ("full", "skip"):
        answered = [item for item in read_items(Path(finished["items"][label])) if item.error is None]
        expected = calibration(answered)
        found = finished["measures"][label]["POPE"]
        assert found["overall"] == pytest.approx({"ece": expected.ece, "brier": expected.brier}, abs=1e-6)
        assert found["random"] == found["overall"]
    assert finished["measure_differences"].keys() == {"skip"}
    assert finished["measure_differences"]["skip"]["POPE"]["overall"]["ece"]["low"] == -1, "one image"
    report = Path(finished["table"]).read_text()
    assert "| calibration error (ECE) | POPE |" in report
    assert "| Brier score | POPE, random |" in report


def test_each_system_has_its_run_in_mlflow(finished):
    from mlflow import MlflowClient

    client = MlflowClient(finished["mlflow_uri"])
    for label, run_id in finished["mlflow_run_ids"].items():
        run = client.get_run(run_id)
        assert (run.info.run_name, run.info.status) == (f"scores.{label}", "FINISHED")
        assert run.data.params["system.label"] == label
        assert run.data.metrics["accuracy/POPE"] == pytest.approx(finished["score"][label]["POPE"])
        assert {"accuracy/POPE/random", "items/POPE", "total/POPE/f1"} <= run.data.metrics.keys()
        assert {"ece/POPE", "ece/POPE/random", "brier/POPE"} <= run.data.metrics.keys()
        assert ("brier_difference_low/POPE" in run.data.metrics) == (label == "skip")
        assert ("difference/POPE" in run.data.metrics) == (label == "skip")
        stored = {file.path for file in client.list_artifacts(run_id)}
        assert stored == {"config.yaml", "items.parquet", "comparison.md", "comparison.png"}
    names = {run.info.run_name for run in client.search_runs([run.info.experiment_id])}
    assert {"scores.full.POPE", "scores.skip.POPE"} <= names


def test_a_finished_job_is_reported_and_other_settings_are_refused(settings, finished):
    again = run_score(ScoreConfig.model_validate({**settings, "max_error_fraction": 0.9}))
    assert {**again, "seconds": 0} == {**finished, "seconds": 0, "already_finished": True}
    with pytest.raises(ConfigError, match=r"sampling\.max_new_tokens: was 8, now 9"):
        run_score(ScoreConfig.model_validate({**settings, "sampling": {"max_new_tokens": 9}}))


@pytest.mark.filterwarnings("ignore:MLflow at .* does not take metrics")
def test_other_settings_of_the_report_write_it_again(settings, finished, monkeypatch):
    """Another experiment rejects the numbers at first; no question is answered again."""
    monkeypatch.setattr(score, "ray_session", lambda: 1 / 0)
    other = {**settings, "confidence": 0.8, "resamples": 500, "tracking": {"experiment": "elsewhere"}}
    with (
        no_metrics(finished["mlflow_uri"]),
        pytest.raises(TrackingError, match=r"did not take .*\n.*Run the same job again to record"),
    ):
        run_score(ScoreConfig.model_validate(other))
    result = run_score(ScoreConfig.model_validate(other))
    assert not result["already_finished"]
    assert run_score(ScoreConfig.model_validate(other))["already_finished"]
    assert "[80 % interval]" in Path(result["table"]).read_text()
    assert result["score"] == finished["score"]
    runs = Tracker(result["mlflow_uri"], "")._client
    for label, run_id in result["mlflow_run_ids"].items():
        assert run_id != finished["mlflow_run_ids"][label]
        assert runs.get_experiment(runs.get_run(run_id).info.experiment_id).name == "elsewhere"
        assert runs.get_run(run_id).info.status == "FINISHED"
    with pytest.raises(ConfigError, match="a further system or dataset needs a job of another name"):
        run_score(ScoreConfig.model_validate({**other, "datasets": [*settings["datasets"], {"name": "MME"}]}))


CAPTIONS = [("a red circle at the top.", "a red circle and a blue star."), ("top", "bottom")]


def test_objects_in_captions_and_places_are_measured(tmp_path):
    rows = [
        {"index": n, "image": png(), "question": "?", "answer": true, "category": category}
        for n, ((true, _), category) in enumerate(zip(CAPTIONS, ("caption", "place"), strict=True))
    ]
    settings = {
        "name": "n",
        "systems": {label: {"model": {"path": "x"}} for label in ("full", "skip")},
        "datasets": [{"name": "Shapes", "path": str(table(tmp_path / "shapes.tsv", rows))}],
        "objects": {"Shapes": ["star"]},
    }
    config = ScoreConfig.model_validate(settings)
    dataset = read_dataset("Shapes", settings["datasets"][0]["path"])
    answers = {"full": [true for true, _ in CAPTIONS], "skip": [answer for _, answer in CAPTIONS]}
    scored = {
        label: {
            "Shapes": score_answers(
                dataset, {str(n): Prediction(text) for n, text in enumerate(texts)}, label
            )
        }
        for label, texts in answers.items()
    }
    measured = measure(config, [dataset], scored)
    found = measures_result(measured)["measures"]
    assert found["full"]["Shapes"]["caption"]["hallucinated_objects"] == 0
    assert found["skip"]["Shapes"]["caption"] == {
        "captions_hallucinated": 1,
        "hallucinated_objects": 1,
        "captions_missed": 0,
        "missed_objects": 0,
    }
    assert found["skip"]["Shapes"]["place"]["place_distance"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["skip"]["Shapes"]["overall"]["captions_hallucinated"] == 0.5, "the word `star`, in all rows"
    report = measures_table(config, measured)
    assert "| hallucinated objects per caption | Shapes, caption | 0.000 | 1.000 | +1.000 [" in report
    assert "| distance, % of the image's side | Shapes, place | 0.0 | 66.7 | +66.7 [" in report
    assert "calibration" not in report, "these answers have no probabilities"
    assert "Calibration: not measured" in measures_table(config, [])
    assert measures_metrics(measured, "skip")["missed_objects/Shapes/caption"] == 0


def test_one_item_has_a_wide_interval():
    """Both in the table and in MLflow."""
    item = Item("d", "1", "full", "", "1", "", 1.0)
    compared = {"skip": {"d": compare([item], [item], resamples=100, confidence=0.95)}}
    scored = {label: {"d": Scored([item], {})} for label in ("full", "skip")}
    config = ScoreConfig.model_validate(
        {
            "name": "n",
            "systems": {label: {"model": {"path": "x"}} for label in scored},
            "datasets": [{"name": "d", "rule": "exact"}],
        }
    )
    assert "| +0.0 [-97.5, +97.5] 1 |" in markdown(config, scored, compared, {})
    assert metrics(scored["skip"], compared["skip"])["difference_low/d"] == pytest.approx(-0.975)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_error_fraction": 0.1}, r"1 of 6 rows are errors \(1 × no usable answer\); .*\(row 5\)"),
        ({"datasets": [{"name": "MMVet", "path": "star.tsv"}]}, "MMVet is scored by a judge"),
        ({"datasets": [{"name": "MMStarr", "path": "star.tsv"}]}, "'MMStarr' is not known"),
        ({"datasets": [{"name": "MMStar", "path": "none.tsv"}]}, "Get it from https"),
        (
            {"datasets": [{"name": "mine", "path": "pope.tsv", "rule": "mathvista"}]},
            "no column `question_type`",
        ),
    ],
)
def test_mistakes_are_reported_before_ray_starts(settings, change, error, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(settings["datasets"][0]["path"]).parent)
    monkeypatch.setattr(score, "ray_session", lambda: 1 / 0)
    with pytest.raises((ConfigError, DataError), match=error):
        run_score(ScoreConfig.model_validate({**settings, "storage": str(tmp_path), **change}))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"objects": {"Pope": ["dog"]}}, "objects: 'Pope' is none of the datasets: POPE"),
        ({"objects": {"POPE": [""]}}, "objects: POPE: give at least one word"),
        ({"reference": "all"}, "reference = 'all' is none of the systems: full, skip"),
        ({"datasets": [{"name": "MME"}, {"name": "MME"}]}, "MME occurs twice"),
        ({"datasets": []}, "datasets"),
        ({"sampling": {"n": 2}}, "one text is scored per question"),
    ],
)
def test_contradictory_settings_are_refused(settings, change, error):
    with pytest.raises(ValueError, match=error):
        ScoreConfig.model_validate({**settings, **change})
