"""What vLLM refuses before it starts, and what it starts without pruning."""

import json

import pytest

from skipvision import SkipConfig
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.integrations.vllm.startup import settings_of
from tests.skipvision.integrations.vllm.running.conftest import QUESTION, prompt


@pytest.fixture
def configure(exported, tmp_path):
    """Build vLLM's configuration for the exported model; arguments change its config.json and the engine."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()

    def build(skip=None, entry=None, **engine):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in exported.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        config["skip_vision"]["skip"] |= entry or {}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        kwargs = {} if skip is None else {"mm_processor_kwargs": {"skip": skip, "use_fast": True}}
        arguments = EngineArgs(str(folder), dtype="float32", max_model_len=1024, **{**kwargs, **engine})
        return arguments.create_engine_config()

    return build


def test_fields_of_the_server_replace_exported_ones_and_reach_no_processor(configure):
    config = configure(skip={"retained": 100})
    settings = settings_of(config.model_config.hf_config)
    assert settings.default == SkipConfig(retained=100, skipped=0)
    assert config.model_config.multimodal_config.mm_processor_kwargs == {"use_fast": True}
    assert config.model_config.uses_mrope


def test_contiguous_positions_need_no_buffers(configure):
    config = configure(skip={"positions": "contiguous"}).model_config
    assert settings_of(config.hf_config).positions == "none"
    assert not config.uses_mrope


def test_an_exported_model_with_skipped_tokens_does_not_start(configure):
    with pytest.raises(ValueError, match=r"skipped=64: .*retained=\d+, skipped=0.*map_skipped=true"):
        configure(entry={"skipped": 64})


def test_it_starts_with_retained_tokens_of_equal_cost_on_request(configure):
    config = configure(entry={"skipped": 64}, skip={"map_skipped": True})
    assert 64 < settings_of(config.model_config.hf_config).default.retained < 128


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "only the first stage"),
        ({"hf_overrides": {"text_config": {"rope_parameters": {"rope_type": "yarn"}}}}, "contiguous"),
    ],
)
def test_settings_that_contradict_original_positions(engine, message, configure):
    if "hf_overrides" in engine:
        engine["hf_overrides"]["text_config"]["rope_parameters"] |= {
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 1024,
        }
    with pytest.raises(ValueError, match=message):
        configure(**engine)


def test_with_full_tokens_they_only_refuse_requests_that_prune(configure):
    config = configure(skip="full", pipeline_parallel_size=2, distributed_executor_backend="mp").model_config
    settings = settings_of(config.hf_config)
    assert "only the first stage" in settings.refused
    assert not config.uses_mrope
    with pytest.raises(ValueError, match="this server prunes no images, because pipeline_parallel_size=2"):
        settings.of_request({"retained": 3}, config.hf_config)


def test_an_architecture_without_a_tested_path_is_refused_by_name(exported, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    config = json.loads((exported / "config.json").read_text())
    config |= {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma"}
    config["text_config"] = {"model_type": "gemma", **dict.fromkeys(("hidden_size", "head_dim"), 64)}
    config["vision_config"] = {"model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="does not support PaliGemmaForConditionalGeneration"):
        EngineArgs(
            str(tmp_path), dtype="float32", tokenizer=str(exported), max_model_len=256
        ).create_engine_config()


def test_an_image_that_vllms_cache_cannot_hold_is_refused_with_the_remedy(configure, scenes):
    """A server that prunes by default has less room than an image of full tokens takes."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = configure(max_num_batched_tokens=160, max_num_seqs=8).model_config
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    images = processor.info.parse_mm_data({"image": scenes[:1]})

    def tokens(skip):
        found = processor(prompt(QUESTION), images, hf_processor_mm_kwargs={"skip": skip})
        return found["mm_placeholders"]["image"][0].get_num_embeds()

    assert tokens({"retained": 159}) == 160
    for skip, kept in (({"retained": 160}, 161), ("full", 256)):
        message = rf"takes {kept} tokens, .* holds 160 tokens .* max_num_batched_tokens={kept} or more"
        with pytest.raises(InputError, match=message):
            tokens(skip)


def test_images_of_the_servers_default_always_fit(configure, scenes):
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = configure(skip="full", max_num_batched_tokens=160, max_num_seqs=8).model_config
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    images = processor.info.parse_mm_data({"image": scenes[:1]})
    for skip in (None, "full", {"retained": 200}):
        processor(prompt(QUESTION), images, hf_processor_mm_kwargs={} if skip is None else {"skip": skip})
