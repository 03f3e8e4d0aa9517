"""The public names, which users' scripts depend on."""

import dataclasses
import inspect
import json

import pytest
import yaml

import skipvision
from skipvision import ConfigError, Cost, SkipConfig, TokenPlan, TokenRole, attach, predict_cost
from tests.skipvision.cases import CONFIGS

NAMES = [
    "DECODED_KEYWORD",
    "AdapterError",
    "Attachment",
    "Completion",
    "ConfigError",
    "Cost",
    "DataError",
    "Engine",
    "GenerationError",
    "InputError",
    "Request",
    "ResourceError",
    "Sampling",
    "SkipConfig",
    "SkipVisionError",
    "SoftTargets",
    "TokenPlan",
    "TokenRole",
    "UnsupportedModelError",
    "as_teacher",
    "attach",
    "attachment_of",
    "export",
    "from_exported",
    "load_adapter",
    "measure_flops",
    "predict_cost",
    "read_adapter",
    "register_criterion",
    "register_merge",
    "save_adapter",
]
DEFAULTS = {
    "retained": 100,
    "skipped": 156,
    "select": "similarity",
    "merge": "similarity",
    "summary_tokens": 1,
    "skip_ffn": True,
    "skip_layers": "all",
    "skip_kv": True,
    "drop_after": None,
    "size_bias": False,
    "positions": "original",
    "layout": "raster",
    "probe_layer": 0,
    "seed": 0,
}
CHOICES = {
    "select": [
        "similarity",
        "ffn_ratio",
        "diversity",
        "norm",
        "views",
        "uniform",
        "random",
        "attention",
        "vision_attention",
        "relevance",
    ],
    "merge": ["similarity", "pool", "drop", "tome", "grid"],
    "positions": ["original", "contiguous"],
    "layout": ["raster", "grouped"],
}


def test_the_public_names():
    assert skipvision.__all__ == NAMES
    for name in NAMES:
        assert getattr(skipvision, name).__doc__, f"{name} has no docstring"


def test_the_configs_fields_and_defaults():
    assert SkipConfig().model_dump() == DEFAULTS
    for name, field in SkipConfig.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHOICES for value in CHOICES[name]])
def test_every_promised_choice(name, value):
    assert getattr(SkipConfig(**{"retained": 0, name: value}), name) == value


def test_lists_of_layers_are_sets():
    config = SkipConfig(skip_layers=[2, 0, 2])
    assert config.skip_layers == (0, 2)
    assert config == SkipConfig.from_yaml("skip_layers: [0, 2]")
    assert hash(config) == hash(SkipConfig(skip_layers=(0, 2)))


@pytest.mark.parametrize("value", [[], [-1], [1.0], 3, "some", [True]])
def test_lists_of_layers_that_are_none(value):
    with pytest.raises(ConfigError, match="skip_layers"):
        SkipConfig(skip_layers=value)


def test_full_is_the_identity():
    full = SkipConfig.full()
    assert (full.retained, full.skipped, full.summary_tokens) == (1.0, 0.0, 0)
    assert full.counts(576) == (576, 0, 0)
    assert full.is_full
    assert SkipConfig(retained=1.0, skipped=0, summary_tokens=0, select="norm").is_full
    assert not SkipConfig(retained=1.0, skipped=0, summary_tokens=0, drop_after=0).is_full
    for other in ({"retained": 1, "summary_tokens": 0}, {"retained": 1.0}, {"summary_tokens": 0}):
        assert not SkipConfig(skipped=0, **other).is_full


@pytest.mark.parametrize("config", [*CONFIGS.values(), SkipConfig.full()], ids=[*CONFIGS, "full"])
def test_configs_survive_yaml_and_json(config, tmp_path):
    for again in (
        SkipConfig.from_yaml(config.to_yaml()),
        SkipConfig(**json.loads(json.dumps(config.model_dump()))),
        SkipConfig.model_validate_json(config.model_dump_json()),
        SkipConfig.model_validate(config.model_dump()),
        SkipConfig(**json.loads(config.model_dump_json())),
    ):
        assert again == config
        # 1 is one token, 1.0 is all of them.
        assert type(again.retained) is type(config.retained)
        assert type(again.skipped) is type(config.skipped)
    assert yaml.safe_load(config.to_yaml()) == config.model_dump()
    config.to_json(tmp_path / "config.json")
    assert SkipConfig(**json.loads((tmp_path / "config.json").read_text())) == config


def test_yaml_may_be_partial():
    assert SkipConfig.from_yaml("retained: 0.25\nmerge: pool") == SkipConfig(retained=0.25, merge="pool")


def test_roles():
    assert [role.name for role in TokenRole] == ["TEXT", "RETAINED", "SKIPPED", "SUMMARY", "PADDING"]
    assert [int(role) for role in TokenRole] == [0, 1, 2, 3, 4]


def test_the_plans_fields():
    names = {field.name for field in dataclasses.fields(TokenPlan)}
    assert {"roles", "source", "merged_into", "ffn_mask", "cache_mask"} <= names


def test_the_costs_fields():
    names = {field.name for field in dataclasses.fields(Cost)}
    assert {"prefill_flops", "decode_flops", "train_flops", "kv_bytes"} <= names
    assert isinstance(Cost.ratio_to_full, property)


def test_signatures():
    assert list(inspect.signature(attach).parameters) == ["model", "config"]
    parameters = inspect.signature(predict_cost).parameters
    assert list(parameters)[:2] == ["model_config", "config"]
    assert {"images", "text_tokens", "new_tokens"} <= parameters.keys()
    for options in list(parameters.values())[2:]:
        assert options.kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(skipvision.save_adapter).parameters) == ["model", "folder", "name"]
    assert list(inspect.signature(skipvision.load_adapter).parameters)[:2] == ["model", "folder"]


def test_a_json_file_is_read_as_it_was_written(tmp_path):
    config = SkipConfig(retained=0.25, select="random", seed=3)
    config.to_json(tmp_path / "config.json")
    assert SkipConfig.from_json(str(tmp_path / "config.json")) == config
    (tmp_path / "config.json").write_text('{"retained": 0.25}')
    assert SkipConfig.from_json(tmp_path / "config.json") == SkipConfig(retained=0.25)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("retained: [", "cannot be read"),
        ("retained: 1\nskipped: 2\nretained: 3", "retained given more than once"),
        ("- 1", "mapping of fields, not list"),
        ("retained: 2.5", "retained=2.5"),
        ("1: 2", "no such field"),
    ],
)
def test_invalid_yaml_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        SkipConfig.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ('{"seed": 1, "seed": 2}', "seed given more than once"),
        ("[]", "not list"),
        ('{"skipped": "x"}', "skipped='x'"),
    ],
)
def test_invalid_json_is_refused(text, says, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        SkipConfig.from_json(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        SkipConfig.from_json(tmp_path / "none.json")


def test_pydantics_validation_methods_raise_our_error():
    with pytest.raises(ConfigError, match="Invalid JSON"):
        SkipConfig.model_validate_json("{")
    with pytest.raises(ConfigError, match=r"^SkipConfig: seed=-1: "):
        SkipConfig.model_validate_json('{"seed": -1}')
    with pytest.raises(ConfigError, match=r"^SkipConfig: seed=-1: "):
        SkipConfig.model_validate({"seed": -1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("summary_tokens", True),
        ("summary_tokens", "2"),
        ("summary_tokens", 1_000_000),
        ("seed", 2**70),
        ("seed", True),
        ("probe_layer", "0"),
        ("skip_ffn", "yes"),
        ("skip_kv", 1),
        ("retained", True),
    ],
)
def test_values_of_another_type_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        SkipConfig(**{name: value})
