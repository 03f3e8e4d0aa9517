from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from pipelines.finetune.config import FinetuneConfig
from pipelines.shared.config import load_config, run_job
from skipvision.errors import ConfigError, DataError
from skipvision.select import CRITERIA

SELECT = tuple(CRITERIA)
ELSEWHERE = "(methods of other packages need SKIPVISION_METHODS; see docs/library.md)"


class Training(BaseModel):
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: list[float] = [0.9, 0.999]


class Skip(BaseModel):
    retained: int | float = 1.0
    skipped: int = 0


class Data(BaseModel):
    path: Path
    weight: float = 1.0


class Job(BaseModel):
    name: str = "run"
    folder: Path | None = None
    training: Training = Training(learning_rate=2e-4)
    skip: Skip | None = None
    data: list[Data] = Field([], description="what to train on")
    workers: int = 1

    @model_validator(mode="after")
    def _enough_data(self) -> Job:
        if self.workers > 8 and not self.data:
            raise ValueError("more than 8 workers need data")
        return self


class Folder(BaseModel):
    folder: Path


class Table(BaseModel):
    uri: str


class Reader(BaseModel):
    seed: int = Field(description="seed of everything")
    source: Folder | Table = Folder(folder=Path("images"))


def load(*argv: str) -> Job:
    return load_config(Job, argv, description="Train.")


def problem(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str | bytes) -> str:
        file = tmp_path / "job.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


# ----------------------------------------------------------------------------------- reading settings


def test_without_arguments_the_defaults_apply():
    assert load() == Job()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(yaml_file):
    file = yaml_file("name: first\nworkers: 2\ntraining: {schedule: constant}\ndata: [{path: a}, {path: b}]")
    job = load("--workers=4", "--config", file, "--data", "[{path: c, weight: .5}]")
    assert (job.name, job.workers, job.training.schedule) == ("first", 4, "constant")
    assert job.data == [Data(path=Path("c"), weight=0.5)]


def test_a_section_given_in_part_keeps_its_own_defaults(yaml_file):
    assert load("--config", yaml_file("training: {schedule: constant}")).training.learning_rate == 2e-4
    assert load("--training.schedule", "constant").training.learning_rate == 2e-4


def test_an_override_creates_an_absent_section(yaml_file):
    assert load("--skip.skipped", "64").skip == Skip(skipped=64)
    assert load("--config", yaml_file("skip: null"), "--skip.skipped", "64").skip == Skip(skipped=64)
    assert load("--config", yaml_file("skip: {skipped: 64}"), "--skip", "null").skip is None


@pytest.mark.parametrize("word", ["1e-3", "0.001", "1.0e-3", "+1E-3"])
def test_every_notation_of_a_number_is_a_number(word, yaml_file):
    assert load("--training.learning_rate", word).training.learning_rate == 0.001
    job = load("--config", yaml_file(f"skip: {{retained: {word}}}"))
    assert job.skip == Skip(retained=0.001)


@pytest.mark.parametrize("word", ["007", "off", "2026-01-31", "1e5", "1_000", "null x", "~/[x]"])
def test_a_text_field_takes_its_words_literally(word):
    assert load("--name", word).name == word
    assert load("--folder", word).folder == Path(word)


def test_literal_text_does_not_hide_other_problems():
    message = problem("--name", "007", "--workers", "many")
    assert "workers = 'many'" in message
    assert "name" not in message


def test_null_is_a_word_where_text_is_required():
    assert load("--folder", "null").folder is None
    assert load("--name", "null").name == "null"


def test_a_negative_number_is_a_value_and_the_last_of_two_values_counts():
    assert load("--skip.skipped", "3", "--skip.skipped", "-1").skip == Skip(skipped=-1)


def test_a_section_of_another_kind_replaces_the_default_one():
    reader = load_config(Reader, ["--seed", "1", "--source.uri", "s3://a"], description=None)
    assert reader.source == Table(uri="s3://a")


def test_an_empty_file_sets_nothing(yaml_file):
    assert load("--config", yaml_file("# nothing yet\n")) == Job()


# ------------------------------------------------------------------------------------ wrong settings


def test_all_problems_are_reported_together(yaml_file):
    file = yaml_file(
        """
        training: {learning_rate: -1, schedule: cosinus, betas: [0.9, x], lerning_rate: 3}
        skip: {retained: many}
        data: [{weight: 2}]
        schedule: constant
        """
    )
    lines = problem("--config", file, "--workers", "two").splitlines()
    assert lines[0] == f"8 problems in the settings from {file} and the command line"
    assert {line.strip().partition(": ")[0]: line.partition(": ")[2] for line in lines[1:]} == {
        "training.learning_rate = -1": "should be greater than 0",
        "training.schedule = 'cosinus'": "should be 'cosine' or 'constant'",
        "training.betas.1 = 'x'": "should be a valid number, unable to parse string as a number",
        "training.lerning_rate = 3": "no such field; did you mean training.learning_rate?",
        "skip.retained = 'many'": "should be a valid integer, unable to parse string as an integer"
        " or should be a valid number, unable to parse string as a number",
        "data.0.path": "is required",
        "schedule = 'constant'": "no such field; did you mean training.schedule?",
        "workers = 'two'": "should be a valid integer, unable to parse string as an integer",
    }


def test_a_problem_between_fields_has_the_models_own_message():
    assert "more than 8 workers need data" in problem("--workers", "9")


def test_an_unknown_field_in_a_list_element_is_reported():
    assert "data.0.wieght = 2: no such field; did you mean data.*.weight?" in problem(
        "--data", "[{path: a, wieght: 2}]"
    )


def test_an_unknown_field_that_resembles_no_other_refers_to_the_help():
    assert "xyzzy = 1: no such field; --help lists the fields" in problem("--xyzzy", "1")


def test_a_missing_required_field_is_reported():
    with pytest.raises(ConfigError, match=r"from the defaults\n  seed: is required"):
        load_config(Reader, [], description=None)


def test_a_long_value_is_shortened():
    assert len(problem("--workers", "x " * 500)) < 300


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "'train' is not an option: write --config FILE or --dotted.field VALUE"),
        (["-w", "3"], "'-w' is not an option"),
        (["--training..x", "3"], "'--training..x' is not an option"),
        (["--", "3"], "'--' is not an option"),
        (["--workers"], "--workers has no value: write --workers VALUE or --workers=VALUE"),
        (["--workers", "--name", "x"], "--workers has no value"),
        (["--data", "[1"], "--data '[1' is not valid YAML: line 1, column 3: expected ',' or ']'"),
        (["--workers.x", "3"], "workers = {'x': 3}: should be a valid integer"),
        (["--name", "a", "--name.x", "3"], "--name.x: name is 'a', which has no fields; set --name"),
    ],
)
def test_a_wrong_command_line_is_reported_with_the_right_form(argv, message):
    assert message in problem(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nworkers: [1", "is not valid YAML: line 2, column 12: expected ',' or ']'"),
        ("name: a\nworkers: 1\nname: b", "is not valid YAML: line 3, column 1: 'name' is given twice"),
        ("- name: a", "must have `field: value` lines; it holds a list"),
        ("name", "must have `field: value` lines; it holds a str"),
        (b"name: \xff", "is not valid YAML: "),
        ("name: !!python/object:os.system x", "is not valid YAML: line 1, column 7"),
    ],
)
def test_a_broken_file_is_reported_with_line_and_column(text, message, yaml_file):
    file = yaml_file(text)
    assert problem("--config", file).startswith(f"{file} {message}")


def test_a_merge_key_is_no_repeated_key(yaml_file):
    text = "data:\n  - &first {path: a, weight: 2}\n  - {<<: *first, path: b}"
    assert load("--config", yaml_file(text)).data[1] == Data(path=Path("b"), weight=2)


def test_a_missing_file_is_reported_with_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        problem("--config", "job.yaml") == f"cannot read job.yaml (in {tmp_path}): No such file or directory"
    )
    assert "it is a folder, not a regular file" in problem("--config", str(tmp_path))


# --------------------------------------------------------------------------- settings of fine-tuning


def finetune_problems(*argv: str) -> list[str]:
    options = ["--name", "x", "--model.path", "m", "--data.train", "t.json", *argv]
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, options, description=None)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_required_fields_of_a_missing_section_are_reported():
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, ["--name", "x"], description=None)
    assert "\n  model.path: is required\n  data.train: is required" in str(caught.value)


def test_a_word_in_place_of_a_section_may_be_a_misspelt_null():
    (line,) = finetune_problems("--skip", "nul")
    assert line == (
        "skip = 'nul': should be null or a section with the fields skip.retained, skip.skipped, "
        "skip.select …; did you mean null?"
    )
    (line,) = finetune_problems("--lora", "16")
    assert line == "lora = 16: should be a section with the fields lora.rank, lora.alpha, lora.dropout …"


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            ["--skip.retained", "1.5"],
            ["skip.retained = 1.5: should be a valid integer or should be less than or equal to 1"],
        ),
        (
            ["--skip.select", "x", "--skip.merge", "y", "--skip.zz", "1"],
            [
                "skip.select = 'x': should be "
                + ", ".join(f"'{name}'" for name in SELECT[:-1])
                + f" or '{SELECT[-1]}' {ELSEWHERE}",
                f"skip.merge = 'y': should be 'similarity', 'pool', 'drop', 'tome' or 'grid' {ELSEWHERE}",
                "skip.zz = 1: no such field; did you mean skip.seed?",
            ],
        ),
        (
            ["--skip.retained", "0", "--skip.skipped", "0"],
            [
                (
                    "skip: retained=0 and skipped=0 leave nothing to merge into (merge='similarity'): "
                    "use merge='drop'"
                )
            ],
        ),
        (
            ["--training.learning_rate", ".inf"],
            ["training.learning_rate = inf: should be a finite number"],
        ),
        (["--training.max_grad_norm", ".nan"], ["training.max_grad_norm = nan: should be a finite number"]),
    ],
)
def test_wrong_fields_of_the_skip_config_are_reported_one_by_one(argv, lines):
    assert finetune_problems(*argv) == lines


# ------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--workers", "x", "--help"]])
def test_help_lists_every_field_and_exits_with_status_0(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        load(*argv)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Train." in text
    for line in [
        "  name    str, default 'run'",
        "  folder    path | null, default null",
        "  training    section",
        "  training.learning_rate    float, default 0.0002\n        peak learning rate of AdamW",
        "  training.schedule    'cosine' | 'constant', default 'cosine'",
        "  training.betas    list of float, default [0.9, 0.999]",
        "  skip    section | null, default null",
        "  skip.retained    int | float, default 1.0",
        "  data    list of section, default []\n        what to train on",
        "  data.*.path    path, required",
        "  workers    int, default 1",
    ]:
        assert line + "\n" in text + "\n"


def test_help_shows_types_without_their_validators(capsys):
    """The counts of `SkipConfig` are ``Annotated`` with validators, which would only confuse a reader."""
    with pytest.raises(SystemExit):
        load_config(FinetuneConfig, ["--help"], description=None)
    text = capsys.readouterr().out
    assert "  skip.retained    int | float, default 0.25\n" in text
    assert (
        "  skip.select    " + " | ".join(f"'{name}'" for name in SELECT) + ", default 'similarity'\n" in text
    )
    assert "annotated" not in text.lower()


# ---------------------------------------------------------------------------------------------- the job


def test_the_results_are_one_line_of_strict_json(capsys):
    def main(argv: list[str]) -> dict[str, object]:
        print("working on", *argv)
        return {"loss": float("nan"), "file": Path("é"), "argv": argv}

    run_job(main, ("a", "b"))
    *before, last = capsys.readouterr().out.splitlines()
    assert before == ["working on a b"]
    assert json.loads(last, parse_constant=pytest.fail) == {"loss": None, "file": "é", "argv": ["a", "b"]}


@pytest.mark.parametrize(("error", "status"), [(ConfigError("odd"), 2), (DataError("odd"), 1)])
def test_errors_of_ours_are_messages_with_an_exit_status(error, status, capsys):
    def main(argv: list[str]) -> dict[str, object]:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_job(main, [])
    assert caught.value.code == status
    assert capsys.readouterr() == ("", "error: odd\n")


def test_a_bug_keeps_its_traceback():
    def main(argv: list[str]) -> dict[str, object]:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_job(main, [])


JOB = '''"""Say hello."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pydantic import BaseModel

from pipelines.shared.config import load_config, run_job


class Hello(BaseModel):
    name: str = "world"


if __name__ == "__main__":
    run_job(lambda argv: load_config(Hello, argv, description=__doc__).model_dump(), sys.argv[1:])
'''


def test_a_job_file_finds_the_root_from_any_directory(tmp_path):
    root = tmp_path / "copy"
    (root / "jobs").mkdir(parents=True)
    (root / "jobs" / "hello.py").write_text(JOB)
    project = Path(__file__).parents[3]
    (root / "pipelines").symlink_to(project / "pipelines")
    (root / "skipvision").mkdir()  # three files alone: the rest takes half a minute to import
    (root / "skipvision" / "__init__.py").touch()
    for name in ("errors.py", "problems.py", "registry.py"):
        (root / "skipvision" / name).symlink_to(project / "skipvision" / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder, script in [(root, "jobs/hello.py"), (tmp_path, "copy/jobs/hello.py")]:
        done = subprocess.run(
            [sys.executable, script, "--name", "you"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, '{"name":"you"}\n', "")
