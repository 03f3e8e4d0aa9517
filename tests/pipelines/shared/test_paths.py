"""Relative paths are resolved to where they can be found again, and all wrong ones are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from pipelines.shared.paths import (
    ArtifactPath,
    InputPath,
    ModelPath,
    OutputPath,
    input_path,
    model_path,
    output_path,
    real_paths,
)
from pipelines.shared.sections import Section
from skipvision.errors import ConfigError


@pytest.fixture(autouse=True)
def _outside(monkeypatch):
    monkeypatch.delenv("SKIPVISION_HOME", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


def test_relative_outputs_start_at_home_or_where_the_user_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert output_path("runs", "storage") == tmp_path / "runs"
    assert output_path("/x/runs", "storage").as_posix() == "/x/runs"
    monkeypatch.setenv("SKIPVISION_HOME", "/home/project")
    assert output_path("runs", "storage").as_posix() == "/home/project/runs"


def test_a_relative_output_inside_a_ray_job_is_refused_without_home(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"storage = runs: .* throw-away copy .* absolute path"):
        output_path("runs", "storage")
    monkeypatch.setenv("SKIPVISION_HOME", "/home/project")
    assert output_path("runs", "storage").as_posix() == "/home/project/runs"


def test_an_output_is_a_folder_and_no_url():
    with pytest.raises(ConfigError, match="not a URL"):
        output_path("s3://bucket/runs", "storage")


def test_inputs_are_looked_for_at_home_and_then_here(monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        (folder / "data").mkdir(parents=True)
    (here / "data" / "a.json").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("SKIPVISION_HOME", str(home))
    assert input_path("data/a.json", "data.train") == str(here / "data" / "a.json")
    (home / "data" / "a.json").touch()
    assert input_path("data/a.json", "data.train") == str(home / "data" / "a.json")
    assert input_path("data/*.json", "data.train") == str(home / "data" / "*.json")
    assert input_path("s3://bucket/a.json", "data.train") == "s3://bucket/a.json"
    with pytest.raises(ConfigError, match=r"data.train = data/b.json: there is no .*home.* nor .*here"):
        input_path("data/b.json", "data.train")


def test_a_model_is_a_folder_or_an_id_of_the_hub(monkeypatch, tmp_path):
    """A missing folder must not be looked up on the hub, which takes long to answer."""
    (tmp_path / "models" / "shapes-llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPVISION_HOME", str(tmp_path))
    assert model_path("models/shapes-llava", "model.path") == str(tmp_path / "models" / "shapes-llava")
    assert model_path("llava-hf/llava-1.5-7b-hf", "model.path") == "llava-hf/llava-1.5-7b-hf"
    assert model_path("gpt2", "model.path") == "gpt2"
    with pytest.raises(
        ConfigError, match=r"models/shape-llava: there is no .*; did you mean models/shapes-llava"
    ):
        model_path("models/shape-llava", "model.path")
    for path in ("./llava", "/nowhere/llava", "~/nowhere/llava", "a/b/c", "two words"):
        with pytest.raises(ConfigError, match=r"model.path = .*there is no"):
            model_path(path, "model.path")


class Part(Section):
    path: InputPath | None = None
    others: tuple[InputPath, ...] = ()


class Settings(Section):
    model: ModelPath = "owner/name"
    adapter: ArtifactPath | None = None
    parts: Mapping[str, Part] = {}
    rows: Sequence[Part] = ()
    storage: OutputPath = "runs"
    name: str = "a.json"


def test_every_path_of_a_job_is_resolved_wherever_it_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    (tmp_path / "link.json").symlink_to("a.json")
    given = Settings(
        adapter="models:/ours@best",
        parts={"one": Part(path="a.json", others=("link.json", "s3://b/c"))},
        rows=[Part(), Part(path="a.json")],
    )
    file = str(tmp_path / "a.json")
    link = str(tmp_path / "link.json")
    assert given.resolved() == Settings(
        adapter="models:/ours@best",
        parts={"one": Part(path=file, others=(link, "s3://b/c"))},
        rows=[Part(), Part(path=file)],
        storage=str(tmp_path / "runs"),
    )
    assert given.storage == "runs"
    assert real_paths(given) == {
        "model": "owner/name",
        "adapter": "models:/ours@best",
        "parts.one.path": file,
        "parts.one.others.0": file,
        "parts.one.others.1": "s3://b/c",
        "rows.1.path": file,
    }


def test_all_paths_that_lead_nowhere_are_reported_together(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wrong = Settings(adapter="gone", rows=[Part(others=("a.json",))], storage="s3://bucket")
    with pytest.raises(ConfigError) as error:
        wrong.resolved()
    first, *lines = str(error.value).splitlines()
    assert first == "3 problems with paths"
    assert [line.split(":")[0] for line in lines] == [
        "  adapter = gone",
        "  rows.0.others.0 = a.json",
        "  storage = s3",
    ]


def test_missing_data_of_the_demo_have_a_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no .*train.json; run `make demo` or jobs/make_"):
        input_path("data/shapes/train.json", "data.train")
    with pytest.raises(ConfigError, match=r"there is no .*other.json$"):
        input_path("data/other.json", "data.train")
