"""What vLLM cannot do for an endpoint is refused by name when the settings are read; without vLLM."""

import json
from importlib.metadata import EntryPoint
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from pipelines.engines.vllm import pruning
from serve.app import build
from serve.config import ModelSection, serve_config
from serve.replica.vllm.settings import check_adapter, engine_model, further_arguments
from skipvision import AdapterError, ConfigError, SkipConfig

LANGUAGE = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
TOWER = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
PRUNED = SkipConfig(retained=4, skipped=0, summary_tokens=0)


@pytest.fixture
def adapter(tmp_path):
    def write(name="a", skip=PRUNED, module=LANGUAGE, kinds=("lora_A", "lora_B"), **fields):
        folder = tmp_path / name
        folder.mkdir()
        saved = {"format": 1, "skip": skip and skip.model_dump(), "lora": True, "hidden_size": 4, "layers": 1}
        (folder / "skip_config.json").write_text(json.dumps(saved))
        config = {"peft_type": "LORA", "r": 12, "bias": "none", **fields}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        weights = {f"{module}.{kind}.weight": torch.zeros(1) for kind in kinds}
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return write


def section(path="m", **values):
    engine = {"backend": "vllm", "engine_kwargs": values.pop("engine_kwargs", {})}
    return ModelSection.model_validate({"path": str(path), "engine": engine, **values})


def test_an_adapter_of_lora_can_be_served(adapter):
    assert check_adapter("a", adapter(), section()) == PRUNED
    assert check_adapter("b", adapter("b", None), section()) == SkipConfig.full()


def test_skipped_tokens_of_model_and_adapters_are_mapped_on_request(adapter, tiny_model):
    skipping = SkipConfig(retained=4, skipped=6, summary_tokens=0)
    mapping = section(tiny_model, skip=skipping, engine_kwargs={"map_skipped": True})
    equal = engine_model(mapping).skip
    assert (equal.skipped, equal.summary_tokens) == (0, 0)
    assert 4 < equal.retained < 10
    assert check_adapter("a", adapter(skip=skipping), mapping) == equal
    assert engine_model(section(tiny_model, skip=skipping)).skip == skipping


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"skip": SkipConfig(retained=4, skipped=3, summary_tokens=0)},
            r"skipped = 3: .*jobs/export\.py with --skip\.retained [5-7] --skip\.skipped 0 .*the same FLOPs",
        ),
        (
            {"skip": SkipConfig(retained=4, skipped=0, summary_tokens=2)},
            "summary_tokens = 2: its summary layer",
        ),
        ({"peft_type": "LOHA"}, "its kind is LOHA"),
        ({"use_dora": True}, "it is DoRA"),
        ({"bias": "lora_only"}, "it changes biases"),
        ({"module": TOWER}, "it changes the vision tower"),
        ({"kinds": ("lora_A", "lora_B", "original")}, r"weights that are not LoRA \(original\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_other_adapters_are_refused_with_the_remedy(adapter, tiny_model, changes, reason):
    with pytest.raises(AdapterError, match=rf"^adapter one .*{reason}.*") as refused:
        check_adapter("one", adapter(**changes), section(tiny_model))
    assert "jobs/export.py" in str(refused.value)


def test_all_that_vllm_cannot_do_is_listed_by_name(tiny_model, adapter, monkeypatch):
    ours = EntryPoint("skipvision", "skipvision.integrations.vllm.plugin:register", "vllm.general_plugins")
    monkeypatch.setattr(pruning, "entry_points", lambda group: [ours])
    monkeypatch.setenv("VLLM_PLUGINS", "")
    model = {
        "path": str(tiny_model),
        "attention": "eager",
        "skip": {"retained": 4, "skipped": 2},
        "adapters": {"one": str(adapter(use_dora=True)), "two": str(adapter("two"))},
        "engine": {
            "backend": "vllm",
            "prefill_tokens": 77,
            "engine_kwargs": {
                "max_num_seqs": 2,
                "enable_lora": True,
                "tensor_parallel_size": 2,
                "max_lora_rank": 8,
                "map_skipped": "yes",
                "mm_processor_kwargs": {"skip": {"retained": 8}},
            },
        },
        "scaling": {"gpus_per_engine": 1},
    }
    with pytest.raises(ConfigError) as refused:
        build({"models": [{"path": str(tiny_model), "name": "other"}, model]})
    message = str(refused.value)
    for text in (
        "models.1.engine.prefill_tokens = 77",
        "models.1.engine.engine_kwargs.max_num_seqs: this is decided by another setting",
        "models.1.engine.engine_kwargs.enable_lora: this is decided by another setting: models.1.adapters",
        "models.1.attention = eager",
        "models.1.skip.skipped = 2: in vLLM no token can bypass",
        "feed-forward networks: set models.1.skip.retained=",
        "or models.1.engine.engine_kwargs.map_skipped to true",
        "models.1.skip: VLLM_PLUGINS='' turns off",
        "models.1.adapters.two: its SkipConfig prunes images: VLLM_PLUGINS=''",
        "models.1.engine.engine_kwargs.mm_processor_kwargs.skip: set models.1.skip instead",
        "models.1.engine.engine_kwargs.map_skipped = 'yes': expected true or false",
        f"models.1.path = {tiny_model}: vLLM does not know the names of its weights",
        "models.1.scaling.gpus_per_engine = 1",
        "models.1.engine.engine_kwargs.max_lora_rank = 8: adapter one has rank 12",
        "adapter one",
    ):
        assert text in message
    assert ("vLLM is not installed here" in message) is (find_spec("vllm") is None)


def test_vllm_gets_room_for_the_adapters(adapter):
    def arguments(sources, **engine_kwargs):
        engine = {"backend": "vllm", "engine_kwargs": engine_kwargs}
        model = {"path": "m", "adapters": sources, "engine": engine}
        (section,) = serve_config({"models": [model], "tracking_uri": "http://mlflow"}).models
        return further_arguments(section)

    assert "enable_lora" not in arguments({})
    plain = {f"a{number}": str(adapter(f"a{number}")) for number in range(2)}
    found = arguments(plain)
    assert (found["max_lora_rank"], found["max_loras"], found["max_cpu_loras"]) == (16, 4, 4)
    more = arguments({**plain, "b": "models:/b@champion"}, max_loras=9)
    assert (more["max_lora_rank"], more["max_cpu_loras"]) == (64, 9)


def test_the_engine_of_a_single_model_is_set_on_the_command_line():
    config = serve_config(
        {
            "model": "m/base",
            "engine.backend": "vllm",
            "engine.max_sequences": "3",
            "engine.engine_kwargs.max_model_len": "1024",
            "engine.engine_kwargs.quantization": "fp8",
        }
    )
    (model,) = config.models
    assert (model.engine.backend, model.engine.max_sequences) == ("vllm", 3)
    assert model.engine.engine_kwargs == {"max_model_len": 1024, "quantization": "fp8"}
    with pytest.raises(ConfigError, match="engine without model"):
        serve_config({"engine.backend": "vllm", "models": [{"path": "m"}]})
    with pytest.raises(ConfigError, match="set backend to vllm"):
        serve_config({"model": "m", "engine.engine_kwargs.seed": "1"})
