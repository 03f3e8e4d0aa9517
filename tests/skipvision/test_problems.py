from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from skipvision import SkipConfig
from skipvision.problems import fields_of, problem_lines


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    limit: int | float | None = Field(None, description="requests at once")


class Ring(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []
    by_user: dict[str, Key] = {}
    skip: SkipConfig | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Ring:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        return self


def lines(tree: Any, **options: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Ring.model_validate(tree)
    return problem_lines(caught.value, Ring, tree, **options)


def test_every_wrong_field_has_one_line_with_its_dotted_name_and_value():
    assert lines(
        {
            "keys": [{"name": 7, "limit": "ten"}],
            "by_user": {"ann": {"limit": 3}},
            "skip": {"retained": -1, "seed": "x"},
            "kyes": [],
        }
    ) == [
        "keys.0.name = 7: should be a valid string",
        (
            "keys.0.limit = 'ten': should be a valid integer, unable to parse string as an integer or "
            "should be a valid number, unable to parse string as a number"
        ),
        "by_user.ann.name: is required",
        "skip.retained = -1: should be greater than or equal to 0",
        "skip.seed = 'x': should be a valid integer",
        "kyes = []: no such field; did you mean keys?",
    ]


def test_a_problem_of_the_whole_model_has_no_name():
    assert lines({"keys": [{"name": "a"}, {"name": "a"}]}) == ["two keys have the same name"]


def test_a_tree_that_is_no_mapping_is_reported():
    (line,) = lines(["a"])
    assert line.startswith("should be a valid dictionary")


def test_values_of_a_file_with_secrets_are_not_quoted():
    tree = {"keys": [{"name": "a", "limit": "hunter2", "secret": "hunter2"}]}
    assert "hunter2" in "\n".join(lines(tree))
    text = "\n".join(lines(tree, show_values=False))
    assert "keys.0.limit: " in text
    assert "keys.0.secret: no such field" in text
    assert "hunter2" not in text


def test_a_name_like_no_other_comes_with_all_fields_or_with_the_callers_advice():
    listed = "the fields are keys, keys.*.name, keys.*.limit, by_user, by_user.*.name"
    (line,) = lines({"xyzzy": 1})
    assert line.startswith(f"xyzzy = 1: no such field; {listed}")
    assert lines({"xyzzy": 1}, all_fields="see --help") == ["xyzzy = 1: no such field; see --help"]


def test_the_fields_of_a_model_come_with_those_of_its_sections():
    fields = {field.name: field for field in fields_of(Ring)}
    assert fields["keys.*.limit"].description == "requests at once"
    assert fields["skip.retained"].default == SkipConfig().retained
