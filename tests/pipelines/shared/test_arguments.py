"""A command-line argument means what the user typed; a YAML file keeps the rules of YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from pipelines.shared.config import load_config
from skipvision.errors import ConfigError

TEXTS = [
    *("a #b", "#b", "a: b", "a:", "{a}", "{a: 1}", "[a]", "[a", "{a", "'a'", '"a"', "it's", 'say "x"'),
    *("~", "~/x", "yes", "No", "on", "true", "0x10", "007", "010", "1e3", "1_000", "1:30", ".5", "1."),
    *("2026-01-31", "*", "*.jpg", "&a b", "!x", "%d", "@a", "`a`", "a | b", "|", ">", "- a", "-", "? a"),
    *("", " ", "a\tb", "a\nb", "---", "...", "é 🎉", "NULL", "None", "null x", "=", "<<", "C:\\new"),
    *("<image>\nWhat?", "a, b", "-1", "-x"),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = ""
    number: float = 0.0


class Job(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: str = "d"
    optional: str | None = "d"
    folder: Path = Path("d")
    optional_folder: Path | None = Path("d")
    choice: Literal["no", "0x10", "a #b", "null"] = "no"
    text_or_list: str | list[str] = "d"
    section: Section = Section()
    integer: int = 1
    optional_integer: int | None = 1
    number: float = 1.0
    either: int | float = 1
    named_or_number: Literal["auto"] | int = "auto"
    switch: bool = False
    texts: list[str] = []
    pair: tuple[str, int] = ("", 0)
    numbers: Sequence[float] = ()
    mapping: Mapping[str, str] = {}
    sections: Mapping[str, Section] = {}
    full_or_section: Section | Literal["full"] | None = None
    anything: list[Any] = []


def load(name: str, text: str) -> Any:
    value: Any = load_config(Job, [f"--{name}={text}"], description=None)
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("text", [*TEXTS, "null"])
@pytest.mark.parametrize("name", ["text", "folder", "section.text"])
def test_a_text_setting_takes_its_argument_literally(name, text):
    assert load(name, text) == (Path(text) if name == "folder" else text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["optional", "optional_folder"])
def test_an_optional_text_is_null_only_by_that_word(name, text):
    assert load(name, text) == (Path(text) if name == "optional_folder" else text)
    assert load(name, "null") is None


@pytest.mark.parametrize("text", ["no", "0x10", "a #b", "null"])
def test_a_choice_of_texts_is_literal(text):
    assert load("choice", text) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("[a]", "- a", "-")])
def test_text_where_a_list_is_possible_is_literal_unless_it_is_a_list(text):
    assert load("text_or_list", text) == text
    assert load("text_or_list", "[a, 007]") == ["a", "007"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("integer", "010", 10),
        ("integer", "0x10", 16),
        ("integer", "1e3", 1000),
        ("integer", "-3", -3),
        ("integer", "1_000", 1000),
        ("optional_integer", "null", None),
        ("optional_integer", "08", 8),
        ("number", "1e-3", 0.001),
        ("number", "010", 10.0),
        ("number", ".5", 0.5),
        ("number", "-.inf", float("-inf")),
        ("either", "2", 2),
        ("either", "0.5", 0.5),
        ("named_or_number", "auto", "auto"),
        ("named_or_number", "012", 12),
        ("switch", "yes", True),
        ("switch", "OFF", False),
        ("switch", "true", True),
        ("texts", "[a, 007, yes, ~, 'q: #1', null]", ["a", "007", "yes", "~", "q: #1", "null"]),
        ("texts", "[0x10, 1e3]", ["0x10", "1e3"]),
        ("texts", "[--training.max_steps, 20]", ["--training.max_steps", "20"]),
        ("pair", "[007, 010]", ("007", 10)),
        ("numbers", "[1e-3, 010, .5]", [0.001, 10.0, 0.5]),
        ("mapping", "{007: yes, a: 1e3}", {"007": "yes", "a": "1e3"}),
        ("mapping.on", "a #b", "a #b"),
        ("sections.x.text", "no", "no"),
        ("sections", "{x: {text: 007, number: 010}}", {"x": Section(text="007", number=10)}),
        ("full_or_section", "full", "full"),
        ("full_or_section", "null", None),
        ("full_or_section", "{text: off}", Section(text="off")),
        ("full_or_section.text", "a: b", "a: b"),
        ("anything", "[1, a, 1e-4, null]", [1, "a", 0.0001, None]),
    ],
)
def test_an_argument_is_read_as_its_fields_type(name, text, value):
    if name in ("mapping.on", "sections.x.text"):
        field, key, *rest = name.split(".")
        found = getattr(load_config(Job, [f"--{name}", text], description=None), field)[key]
        assert (getattr(found, rest[0]) if rest else found) == value
    else:
        assert load(name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("integer", "1:30", "integer = '1:30': should be a valid integer"),
        ("integer", "1 #2", "integer = '1 #2': should be a valid integer"),
        ("integer", "yes", "integer = 'yes': should be a valid integer"),
        ("integer", "", "integer = '': should be a valid integer"),
        ("number", "2026-01-31", "number = '2026-01-31': should be a valid number"),
        ("switch", "maybe", "switch = 'maybe': should be a valid boolean"),
        ("texts", "[a] # b", "--texts '[a] # b' is not valid YAML: line 1, column 4: `#` begins a comment"),
        ("texts", "[a, b #c]", "`#` begins a comment"),
        ("texts", "[a]#b", "`#` begins a comment"),
        ("texts", "", "texts = '': should be a valid list"),
        ("section", "", "section = '': should be a section"),
        ("texts", "&a [*a]", "a value contains itself"),
        ("unknown", "a: b: c", "no such field"),
    ],
)
def test_a_wrong_argument_is_reported_and_never_cut(name, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(Job, [f"--{name}", text], description=None)
    assert message in str(error.value)


def test_a_yaml_file_keeps_the_rules_of_yaml(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("text: a #b\noptional: ~\ninteger: 010\nswitch: yes\ntexts: ['007', a]  # two")
    job = load_config(Job, ["--config", str(file)], description=None)
    assert (job.text, job.optional, job.integer, job.switch, job.texts) == ("a", None, 8, True, ["007", "a"])


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_list_survives_quoting(text):
    assert load("texts", yaml.safe_dump([text], default_flow_style=True, allow_unicode=True)) == [text]
