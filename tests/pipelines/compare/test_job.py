"""The compare job: paired answers, measured costs, the report, and the MLflow records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.compare.config import CompareConfig
from pipelines.compare.job import differences, run_compare
from pipelines.compare.report import markdown
from pipelines.data.images import InlineImage
from pipelines.data.rows import Message, TrainingRow
from pipelines.evaluation.exact_match import Answer
from pipelines.finetune.config import FinetuneConfig
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError

SKIP = {"retained": 4, "skipped": 4, "summary_tokens": 1}


@pytest.fixture
def storage(tiny_model: Path, tmp_path: Path) -> Path:
    """A storage folder with two finished runs, ``full`` and ``skip``."""
    for name, skip in (("full", None), ("skip", SKIP)):
        config = FinetuneConfig.model_validate(
            {
                "name": name,
                "storage": str(tmp_path),
                "model": {"path": str(tiny_model)},
                "data": {"train": "t"},
                "skip": skip,
            }
        )
        model = AutoModelForImageTextToText.from_pretrained(tiny_model)
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules=config.lora.target_modules, init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
        if config.skip is not None:
            sv.attach(model, config.skip)
        adapter = sv.save_adapter(model, tmp_path / name / "adapter")
        uri = config.tracking.absolute_uri(tmp_path)
        tracker = Tracker.start(uri, experiment="tests", run_name=name, artifacts=tmp_path / "artifacts")
        result = {
            "adapter": str(adapter),
            "seconds_per_step": 0.5 if skip else 1.0,
            "training_seconds": 10.0,
            "mlflow_uri": uri,
            "mlflow_run_id": tracker.run_id,
        }
        state = {"config": config.model_dump(mode="json"), "result": result}
        (tmp_path / name / "run.json").write_text(json.dumps(state))
    return tmp_path


def compare(storage: Path, test: Path, **changes: Any) -> dict[str, Any]:
    given = {"full": "full", "skip": "skip", "storage": str(storage), "test": str(test), "threads": 1}
    return run_compare(CompareConfig(**{**given, "max_new_tokens": 3, **changes}))


def test_accuracy_and_costs_are_measured_and_recorded(storage, shapes_data):
    result = compare(storage, shapes_data / "test.json")
    assert result["rows"] == 6
    assert set(result["exact_match"]) == {"full untuned", "skip untuned", "full", "skip"}
    # 16 visual tokens become 4 retained tokens and one summary token per group.
    assert result["ratios"]["kv_bytes_per_image"] == pytest.approx(6 / 16)
    for side in result["costs"].values():
        assert side["prefill_flops"] == pytest.approx(side["prefill_flops_predicted"], rel=0.02)
        assert side["train_flops"] == pytest.approx(side["train_flops_predicted"], rel=0.02)
        assert side["kv_bytes"] == side["kv_bytes_predicted"]
    assert result["ratios"]["seconds_per_step"] == 0.5
    table = Path(result["table"]).read_text()
    assert table == markdown(result)
    assert "| number |" in table
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    tracked = Tracker(uri=f"sqlite:///{storage}/mlflow.db", run_id=_run_id(storage))._client
    run = tracked.get_run(_run_id(storage))
    assert run.data.metrics["ratio_to_full/seconds_per_step"] == 0.5
    assert {a.path for a in tracked.list_artifacts(run.info.run_id)} == {"comparison.md", "comparison.png"}


def _run_id(storage: Path, name: str = "skip") -> str:
    return str(json.loads((storage / name / "run.json").read_text())["result"]["mlflow_run_id"])


@pytest.mark.slow
def test_each_run_gets_its_own_test_metrics(storage, shapes_data):
    result = compare(storage, shapes_data / "test.json", untuned=False)
    tracked = Tracker(uri=f"sqlite:///{storage}/mlflow.db", run_id="")._client
    for name in ("full", "skip"):
        metrics = tracked.get_run(_run_id(storage, name)).data.metrics
        shares = {key: value for key, value in metrics.items() if key.startswith("test/exact_match/")}
        assert shares == {f"test/exact_match/{t}": v for t, v in result["exact_match"][name].items()} != {}


@pytest.mark.slow
def test_only_the_text_between_the_readmes_marks_is_replaced(storage, shapes_data):
    readme = storage / "README.md"
    readme.write_text("# Title\n\n<!-- demo table -->\n| old |\n<!-- /demo table -->\n\nProse.\n")
    for _ in range(2):
        result = compare(storage, shapes_data / "test.json", readme=str(readme), untuned=False)
        table = Path(result["table"]).read_text()
        assert readme.read_text() == (
            f"# Title\n\n<!-- demo table -->\n{table}<!-- /demo table -->\n\nProse.\n"
        )


def test_a_readme_without_marks_is_rejected_before_the_evaluation(storage, tmp_path, shapes_data):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- /demo table --> <!-- demo table -->")
    with pytest.raises(ConfigError, match=r"README.md: it needs a line <!-- demo table -->"):
        compare(storage, shapes_data / "test.json", readme=str(readme))
    with pytest.raises(ConfigError, match=r"no.md: No such file"):
        compare(storage, shapes_data / "test.json", readme=str(tmp_path / "no.md"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": "nobody"}, "no finished"),
        ({"full": "skip"}, "skip: null"),
        ({"test": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_unusable_runs_or_rows_are_rejected(storage, shapes_data, changes, message):
    with pytest.raises(ConfigError, match=message):
        compare(storage, changes.pop("test", shapes_data / "test.json"), **changes)


def test_a_run_that_has_only_begun_is_rejected(storage, shapes_data):
    file = storage / "skip" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "result": None}))
    with pytest.raises(ConfigError, match="skip holds no finished"):
        compare(storage, shapes_data / "test.json")


def test_runs_with_other_training_settings_are_rejected(storage, shapes_data):
    file = storage / "full" / "run.json"
    state = json.loads(file.read_text())
    state["config"]["training"]["learning_rate"] = 0.5
    file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="training"):
        compare(storage, shapes_data / "test.json")


def test_differences_are_paired_by_row_and_resampled_by_image():
    """Both rows of an image fail together, so the interval is that of 40 images, not of 80 rows."""
    rows, full, skip = [], [], []
    for image in range(40):
        for task in ("a", "b"):
            picture = InlineImage(bytes([image]), f"#1 of row {image}{task}")
            rows.append(TrainingRow(f"{image}{task}", (picture,), (Message("user", "?"),), task))
            full.append(Answer("", task, "yes", "yes"))
            skip.append(Answer("", task, "yes", "no" if image < 10 else "yes"))
    found = differences(rows, {"full": full, "skip": skip})
    assert found["overall"].difference == pytest.approx(-0.25)
    # The binomial standard error with 40 independent images.
    spread = 1.96 * np.sqrt(0.25 * 0.75 / 40)
    assert found["overall"].low == pytest.approx(-0.25 - spread, abs=0.03)
    assert found["overall"].high == pytest.approx(-0.25 + spread, abs=0.03)
    assert found["a"].difference == found["b"].difference == pytest.approx(-0.25)
    alike = differences(rows, {"full": full, "skip": full})["overall"]
    assert alike.difference == 0
    assert -alike.low == alike.high == pytest.approx(1 - 0.025 ** (1 / 40)), (
        "no change among 40 images does not exclude one"
    )
