"""Regular expressions of an adapter that are invalid, or that never end, are refused."""

from __future__ import annotations

import json
import time

import pytest

import skipvision as sv
from skipvision.adapters import patterns
from skipvision.adapters.patterns import check_patterns
from skipvision.testing.llava import tiny_llava

NAMES = [f"model.language_model.layers.{n}.self_attn.{part}_proj" for n in range(32) for part in "qkvo"]
SOUND = {
    "a list": {"target_modules": ["q_proj", "(a+)+$"]},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*language_model.*\.(q|k)_proj"},
    "a pattern with a look-ahead": {"target_modules": r"^(?!.*vision).*(?:q_proj|k_proj).*"},
    "ranks": {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1.*q_proj": 4}, "alpha_pattern": {}},
    "layers": {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    "nulls": {"target_modules": None, "rank_pattern": None, "layers_pattern": None},
}
ENDLESS = {
    "nested": {"target_modules": r"([a-z._0-9]+)+X"},
    "alternatives": {"target_modules": r"(.|[a-z_.])*X"},
    "many stars": {"target_modules": ".*" * 12 + "X"},
    "excluded modules": {"target_modules": ["q_proj"], "exclude_modules": r"([a-z._0-9]+)+X"},
    "ranks": {"target_modules": ["q_proj"], "rank_pattern": {r"([a-z._0-9]+)+X": 4}},
    "alphas": {"target_modules": ["q_proj"], "alpha_pattern": {r"([a-z._0-9]+)+X": 4}},
    "layers": {"target_modules": ["q_proj"], "layers_pattern": [r"(([a-z._0-9]+)+X)"]},
}
INVALID = {"no end": "(", "a quantifier first": "*q", "too many": "a{99999999999}", "a lone backslash": "a\\"}


def config(tmp_path, fields):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(fields))
    return file


@pytest.mark.parametrize("name", SOUND)
def test_sound_patterns_pass(name, tmp_path):
    check_patterns(config(tmp_path, SOUND[name]), NAMES)


@pytest.mark.parametrize("name", ENDLESS)
def test_patterns_without_an_end_are_stopped(name, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "PATTERN_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(sv.AdapterError, match=r"take more than 0\.3 s to match"):
        check_patterns(config(tmp_path, ENDLESS[name]), NAMES)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("pattern", INVALID.values(), ids=INVALID)
def test_invalid_patterns_are_refused(pattern, tmp_path):
    with pytest.raises(sv.AdapterError, match="is not a regular expression"):
        check_patterns(config(tmp_path, {"target_modules": pattern}), NAMES)


def test_load_adapter_tries_the_patterns_before_it_changes_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "PATTERN_SECONDS", 0.3)
    model = tiny_llava()
    config(tmp_path, {"peft_type": "LORA", **ENDLESS["nested"]})
    with pytest.raises(sv.AdapterError, match="take more than"):
        sv.load_adapter(model, tmp_path, config=sv.SkipConfig(retained=2, skipped=2))
    assert not hasattr(model, "peft_config")
    assert sv.attachment_of(model) is None
