"""The analysis job: its files, its MLflow run, and the settings it rejects before it measures."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.analyse.config import AnalyseConfig
from pipelines.analyse.job import run_analyse
from pipelines.analyse.report import markdown, medians


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    lora = LoraConfig(target_modules=r".*language_model.*(q|v|down)_proj", init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    sv.attach(tuned, sv.SkipConfig(retained=0.25, skipped=0.25))
    folder = tmp_path_factory.mktemp("adapter")
    sv.save_adapter(tuned, folder)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """One storage for all tests, because MLflow takes seconds to create its tables."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def config(tiny_model, shapes_data, storage):
    return {
        "name": "mine",
        "storage": str(storage),
        "model": {"path": str(tiny_model)},
        "data": str(shapes_data / "validation.json"),
        "ratio_rows": 5,
        "bound_rows": 1,
        "batch_size": 2,
        "threads": 1,
    }


def test_base_and_tuned_models_are_measured_drawn_and_recorded(config, adapter, storage):
    result = run_analyse(AnalyseConfig(**config, adapter=str(adapter)))
    folder = storage / "mine"
    for name in ("ffn_ratios.png", "ffn_heat.png", "skip_errors.png"):
        with Image.open(folder / name) as figure:
            assert min(figure.size) > 300
    found = json.loads((folder / "analysis.json").read_text())
    assert found["skip"]["retained"] == 0.25
    assert (folder / "analysis_table.md").read_text() == markdown(found["variants"])
    client = MlflowClient(result["mlflow_uri"])
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "skip_errors.png",
        "analysis.json",
    }
    for name in ("base", "tuned"):
        variant = found["variants"][name]
        assert [prompt["tokens"] - prompt["skipped"] > 4 for prompt in variant["bounds"]] == [True]
        *layers, output = medians(variant)
        assert len(layers) == 2
        assert 0 < output["measured"] <= output["summed"] <= output["composite"]
        assert result["variants"][name]["output"] == output
        assert run.data.metrics[f"{name}/error/measured"] == pytest.approx(output["measured"])
        curve = client.get_metric_history(run.info.run_id, f"{name}/ffn_ratio/visual")
        means = variant["ratios"]["visual"]["mean"]
        assert [point.value for point in sorted(curve, key=lambda p: p.step)] == pytest.approx(means)
    assert found["variants"]["base"]["ratios"] != found["variants"]["tuned"]["ratios"]


def test_the_bound_from_spectral_norms_is_optional(config, storage):
    """The report folder is the job's own folder, which holds the files already."""
    own = {"name": "other", "report": str(storage / "other")}
    run_analyse(AnalyseConfig(**{**config, **own}, skip={"retained": 4}, worst_case=False))
    found = json.loads((storage / "other" / "analysis.json").read_text())
    assert list(found["variants"]) == ["base"]
    assert {layer["worst"] for layer in medians(found["variants"]["base"])} == {None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, sv.ConfigError, "skip is null"),
        ({"adapter": "none"}, sv.ConfigError, "adapter = none"),
        ({"data": "none.json", "skip": {}}, sv.ConfigError, "data = none.json"),
        ({"model": {"path": "/none/here"}, "skip": {}}, sv.ConfigError, "model.path"),
        ({"name": "../up"}, ValueError, "pattern"),
        ({"report": __file__, "skip": {}}, sv.ConfigError, r"report = .*\.py: File exists; give a folder"),
    ],
)
def test_unusable_settings_are_rejected(config, changes, error, message):
    with pytest.raises(error, match=message):
        run_analyse(AnalyseConfig(**{**config, "name": "rejected", **changes}))


def test_rows_without_images_are_rejected(config, tmp_path):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(sv.DataError, match="no row has an image"):
        run_analyse(
            AnalyseConfig(**{**config, "name": "text", "data": str(tmp_path / "text.jsonl"), "skip": {}})
        )


def test_a_failure_ends_the_mlflow_run_as_failed(config, storage):
    with pytest.raises(sv.ConfigError):
        run_analyse(AnalyseConfig(**{**config, "name": "failing"}, skip={"retained": 4, "select": "views"}))
    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    [run] = [run for run in runs if run.info.run_name == "failing"]
    assert run.info.status == "FAILED"
