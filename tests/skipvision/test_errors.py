"""Errors state the problem, the value that caused it, and the remedy."""

import accelerate
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from pydantic import BaseModel, ValidationError
from transformers import AutoModelForCausalLM, BertConfig, BertModel, StaticCache
from transformers.models.auto import AutoConfig

import skipvision
from skipvision import (
    ConfigError,
    InputError,
    SkipConfig,
    SkipVisionError,
    UnsupportedModelError,
    attach,
    attachment_of,
    predict_cost,
)
from skipvision.testing.families import tiny_model
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS

# ---------------------------------------------------------------------------------------- models


def small_bert():
    return BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )


def small_llama():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=9,
        )
    )


def llava_without_layers():
    model = tiny_llava()
    model.model.language_model.layers = torch.nn.ModuleList()
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (small_bert, "BertModel takes no images"),
        (small_llama, "LlamaForCausalLM takes no images"),
        (lambda: torch.nn.Linear(2, 2), "Linear contains no Hugging Face PreTrainedModel"),
        (llava_without_layers, "has no decoder with a list of layers: LlamaModel"),
        (
            lambda: tiny_llava(text="gpt_neox", num_hidden_layers=1),
            r"layer 0 of the decoder \(GPTNeoXLayer\) consists of .*attention",
        ),
    ],
)
def test_models_that_cannot_be_hooked(build, message):
    model = build()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for use in (lambda: attach(model, SkipConfig()), lambda: attachment_of(model)):
        with pytest.raises(UnsupportedModelError, match=message):
            use()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_attaching_twice():
    model = tiny_llava()
    with attach(model, CONFIGS["counts"]) as skip:
        with pytest.raises(ConfigError, match=r"attached to this model already: detach\(\) it first"):
            attach(model, CONFIGS["pool"])
        assert attachment_of(model) is skip
        model(**tiny_inputs(ROWS))
        assert skip.plan is not None, "the first attachment keeps working"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"select": "ffn_ratio", "probe_layer": 3}, r"probe_layer=3, but the decoder has layers 0 … 2"),
        ({"skip_layers": [1, 3]}, r"skip_layers=\[1, 3\], but the decoder has layers 0 … 2"),
        ({"drop_after": 2}, r"drop_after=2, but the decoder has layers 0 … 2: name one that has a layer"),
        ({"select": "views"}, "select='views' needs a multi-view family; LlavaModel"),
        ({"select": "attention", "probe_layer": 3}, r"probe_layer=3, but the decoder has layers 0 … 2"),
    ],
)
def test_configs_that_do_not_fit_the_model(values, message):
    model = tiny_llava()
    with pytest.raises(ConfigError, match=message):
        attach(model, SkipConfig(**values))
    assert attachment_of(model) is None
    assert not any("summary" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"select": "vision_attention"}, "select='vision_attention'"),
        ({"retained": 0, "merge": "grid"}, "merge='grid'"),
    ],
)
def test_tokens_that_are_not_patches(values, name):
    model = tiny_model("internvl")
    with pytest.raises(ConfigError, match=f"{name} needs a family .* InternVLModel are not known to be"):
        attach(model, SkipConfig(**values))
    assert attachment_of(model) is None


@pytest.mark.parametrize("values", [{"select": "vision_attention"}, {"retained": 0, "merge": "grid"}])
def test_images_of_another_size_than_the_towers(values):
    model = tiny_llava()
    model.config.vision_config.image_size = 20
    with (
        attach(model, SkipConfig(**{"skipped": 4, **values})),
        pytest.raises(UnsupportedModelError, match=r"\[16\] visual tokens, .* image has 25 patches"),
    ):
        model(**tiny_inputs([["image", 2]]))


def test_encoded_images_without_the_towers_attention():
    model, inputs = tiny_llava(), tiny_inputs([["image", 2]])
    encoded = {"image": model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with (
        attach(model, SkipConfig(retained=4, skipped=4, select="vision_attention")),
        pytest.raises(InputError, match="encode them while Skip-Vision is attached with select="),
    ):
        model(**inputs, mm_encoder_outputs=encoded)


def test_attention_that_cannot_be_read():
    model = tiny_llava()
    own = model.model.language_model.layers[0].self_attn
    config = SkipConfig(retained=4, skipped=4, select="attention")
    own.forward = lambda hidden_states, **others: (hidden_states, None)
    with attach(model, config), pytest.raises(UnsupportedModelError, match="LlamaAttention does not pass"):
        model(**tiny_inputs([["image", 2]]))
    assert own.config is model.model.language_model.layers[1].self_attn.config, (
        "the module has its own config again"
    )
    del own.config
    with pytest.raises(UnsupportedModelError, match="LlamaAttention does not pass queries and keys"):
        attach(model, config)
    assert attachment_of(model) is None


# --------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skipped": 0, "merge": "tome"}, "merge='tome' makes the skipped tokens, but skipped=0"),
        ({"merge": "grid"}, r"use retained=0, and skipped for .* \(retained=100, skipped=156\)"),
        ({"retained": 0, "skipped": 0, "merge": "grid"}, r"\(retained=0, skipped=0\)"),
    ],
)
def test_amounts_that_do_not_fit_the_merge(values, message):
    with pytest.raises(ConfigError, match=message):
        SkipConfig(**values)


def test_all_wrong_values_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        SkipConfig(
            retained=-3,
            skipped=1.5,
            select="attentive",
            merge="average",
            summary_tokens=-1,
            skip_ffn="perhaps",
            positions="new",
            layout="spiral",
            probe_layer=-2,
            seed="lucky",
            speed=11,
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    for line, expected in zip(
        lines,
        [
            "retained=-3: ",
            "skipped=1.5: ",
            "select='attentive': ",
            "merge='average': ",
            "summary_tokens=-1: ",
            "skip_ffn='perhaps': ",
            "positions='new': ",
            "layout='spiral': ",
            "probe_layer=-2: ",
            "seed='lucky': ",
            "speed=11: no such field; did you mean seed?",
        ],
        strict=True,
    ):
        assert expected in line
    assert "'similarity', 'ffn_ratio'" in lines[2], "the message lists the allowed names"


@pytest.mark.parametrize(
    "values",
    [
        {"retained": True},
        {"retained": "100"},
        {"retained": None},
        {"retained": 1.0001},
        {"skipped": -0.1},
        {"skipped": float("nan")},
        {"summary_tokens": 1.5},
    ],
)
def test_amounts_are_counts_or_fractions(values):
    ((name, value),) = values.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        SkipConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"retained": 0, "skipped": 0}, "retained=0 and skipped=0 leave nothing to merge into"),
        ({"retained": 0.0, "skipped": 0, "merge": "pool"}, "skipped=0"),
        ({"retained": 5, "skipped": 0, "merge": "pool"}, "use merge='similarity' or 'drop'"),
    ],
)
def test_nothing_to_merge_into(values, message):
    with pytest.raises(ConfigError, match=message):
        SkipConfig(**values)
    SkipConfig(**{**values, "merge": "drop"})


@pytest.mark.parametrize("text", ["", "7", "- retained", "[1, 2]"])
def test_yaml_that_is_no_mapping(text):
    with pytest.raises(ConfigError, match="is a mapping of fields"):
        SkipConfig.from_yaml(text)


def test_a_config_cannot_be_changed():
    config = SkipConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.retained = 7
    assert hash(config) == hash(SkipConfig())


def test_a_bad_config_inside_another_model_is_named_there():
    class Job(BaseModel):
        skip: SkipConfig

    with pytest.raises(ValidationError, match="retained=-1"):
        Job.model_validate({"skip": {"retained": -1}})


# ---------------------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def model():
    model = tiny_llava()
    with attach(model, CONFIGS["counts"]):
        yield model


@pytest.fixture
def inputs():
    return tiny_inputs(ROWS)


def test_embeddings_without_ids(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(InputError, match=r"inputs_embeds without input_ids.*Pass input_ids"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with pytest.raises(InputError, match="inputs_embeds without input_ids"):
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=2)


def test_placeholders_without_images(model, inputs):
    del inputs["pixel_values"]
    with pytest.raises(InputError, match="input_ids hold 48 image placeholders but neither pixel_values"):
        model(**inputs)


@pytest.mark.parametrize("images", [1, 5])
def test_placeholders_that_do_not_fit_the_images(model, inputs, images):
    inputs["pixel_values"] = torch.zeros(images, 3, 16, 16)
    with pytest.raises(
        InputError, match=f"48 image placeholders but the images have .*together {16 * images}"
    ):
        model(**inputs)


def test_no_images_at_all(model, inputs):
    inputs["pixel_values"] = torch.zeros(0, 3, 16, 16)
    with pytest.raises(InputError, match="48 image placeholders but neither"):
        model(**inputs)


def test_an_image_across_two_rows_is_refused(model):
    inputs = tiny_inputs([["image", 3], ["image", 3]])
    word, image = inputs["input_ids"][0, -1], IMAGE_TOKEN
    inputs["input_ids"] = torch.stack(
        [torch.tensor([image] * 12 + [word] * 7), torch.tensor([image] * 19 + [image])[:19]]
    )
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[word], [image]])], dim=1)
    del inputs["attention_mask"]
    with pytest.raises(InputError, match="span two rows"):
        model(**inputs)


def test_placeholders_that_are_no_whole_image(model):
    inputs = tiny_inputs([["image", 3]])
    inputs["input_ids"] = torch.tensor([[IMAGE_TOKEN] * 12 + [7] * 7])
    with pytest.raises(InputError, match=r"12 image placeholders but the images have \[16\] visual tokens"):
        model(**inputs)


def test_a_mask_of_four_dimensions(model, inputs):
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(
        InputError, match=rf"attention_mask \(3, 1, {length}, {length}\) cannot be reduced: a 2-D mask"
    ):
        model(**inputs)


def test_a_mask_of_another_length(model, inputs):
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(InputError, match="a 2-D mask of shape"):
        model(**inputs)


def test_a_static_cache(model, inputs):
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with pytest.raises(UnsupportedModelError, match="layer 0 is a StaticLayer, which cannot be pruned"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(SkipVisionError):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_a_refused_call_does_not_spoil_the_next(model, inputs):
    expected = model(**inputs).logits
    with pytest.raises(InputError):
        model(**{**inputs, "pixel_values": None})
    assert torch.equal(model(**inputs).logits, expected)


# ------------------------------------------------------------------------------------ the tree


def test_one_base_class_catches_all_errors():
    errors = [getattr(skipvision, name) for name in skipvision.__all__ if name.endswith("Error")]
    assert len(errors) == 8
    for error in errors:
        assert issubclass(error, SkipVisionError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(InputError, ValueError)
    assert issubclass(UnsupportedModelError, TypeError)


def test_a_config_of_another_type(model):
    detached = tiny_llava()
    with pytest.raises(ConfigError, match=r"config is a dict.*pass a SkipConfig"):
        attach(detached, {"retained": 1})


@pytest.mark.parametrize(
    "wrong", [{"images": -1}, {"text_tokens": 1.5}, {"lora_rank": -1}, {"visual_tokens": -3}]
)
def test_costs_of_impossible_numbers(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}: expected a whole number"):
        predict_cost(tiny_llava().config, None, **wrong)


@pytest.mark.parametrize("kind", ["on the CPU", "on the disk", "in part"])
def test_offloaded_models_are_refused_by_attach(kind, tmp_path):
    model = tiny_llava()
    if kind == "on the CPU":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif kind == "on the disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        places["model.language_model"] = "disk"
        accelerate.dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"accelerate has offloaded model\..* without offload"):
        attach(model, SkipConfig(retained=4, skipped=5))


def test_prompt_tuning_is_refused_by_attach():
    model = get_peft_model(tiny_llava(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match="'default' is PROMPT_TUNING, which adds virtual tokens"):
        attach(model, SkipConfig(retained=4, skipped=5))
