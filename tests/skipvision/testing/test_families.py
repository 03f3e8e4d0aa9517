"""The tiny models of all families, and their inputs, are a sound basis for a conformance suite."""

from __future__ import annotations

import functools
import importlib.util
import inspect

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from skipvision._compat import encoder_defaults, model_output
from skipvision.anatomy.pictures import ONE_A_ROW, RECIPES
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.testing.configs import EXCEPTIONS, FIRST_SPECIAL, FIRST_WORD
from skipvision.testing.families import FAMILIES, UNSUPPORTED, tiny_batch, tiny_model
from skipvision.testing.prompts import FRAMES, TOKEN_TYPES
from tests.skipvision.family_table import LEFT_OUT

ROWS = [[3, "image", 4], [5], ["image", 2, "small image", 3], [2, "large image", 1]]
ROWS_OF_ONE = [[3, "image", 4], ["small image", 2], [2, "large image", 1]]
LAYERS = {"nemotron_h_omni": 4}  # one block of each kind
UNEQUAL = {
    "emu3": "its tower sees the padding of an image to the largest of the batch",
    "hunyuan_vl": "its position ids number the images of the whole batch, not of each row",
}
OLDER_CODE = {"fuyu", "granite4_vision", "minicpmv4_6", "minimax_m3_vl"} if "idefics2" in LEFT_OUT else set()
"""Families that Skip-Vision does not support, whose code before transformers 5.18 takes other inputs."""
families = pytest.mark.parametrize("family", sorted(set(FAMILIES) - OLDER_CODE))


@functools.cache
def model_of(family):
    try:
        return tiny_model(family)
    except UnsupportedModelError as error:
        if "timm" not in str(error):
            raise
        pytest.skip(str(error))


def rows_of(family):
    return ROWS_OF_ONE if family in ONE_A_ROW else ROWS


def placeholders(model, batch):
    return (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()


@families
def test_models_are_small_finite_and_in_eval_mode(family):
    model = model_of(family)
    # gemma3n's tower is timm's, which has one size.
    assert family == "gemma3n" or sum(weight.numel() for weight in model.parameters()) <= 1_000_000
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.training
    assert model.config.get_text_config().num_hidden_layers == LAYERS.get(family, 3)


@families
def test_placeholders_match_features_and_the_model_accepts_every_input(family):
    model = model_of(family)
    batch = tiny_batch(model, rows_of(family))
    assert batch.keys() <= inspect.signature(model.forward).parameters.keys()
    text = {"input_ids", "attention_mask", *TOKEN_TYPES}
    vision = {name: value for name, value in batch.items() if name not in text}
    encoder = model.base_model.get_image_features
    vision |= encoder_defaults(model.base_model, encoder)
    with torch.no_grad():
        output = encoder(**vision, return_dict=True)
    found = model_output(output, "pooler_output")
    if found is None:
        found = output["deepstack_features"][0][1] if "deepstack_features" in output else output[0]
    width = model.config.get_text_config().hidden_size
    assert sum(placeholders(model, batch)) == sum(features.numel() for features in found) // width


@families
def test_a_row_is_the_same_alone_and_in_a_batch_with_either_padding(family):
    model, rows = model_of(family), rows_of(family)
    batches = {padding: tiny_batch(model, rows, padding=padding) for padding in ("left", "right")}
    with torch.no_grad():
        logits = {padding: model(**batch).logits for padding, batch in batches.items()}
    for number, row in enumerate(rows):
        alone = tiny_batch(model, [row], row_numbers=[number])
        assert alone["attention_mask"].all()
        with torch.no_grad():
            expected = model(**alone).logits[0]
        for padding, batch in batches.items():
            kept = batch["attention_mask"][number].bool()
            found = logits[padding][number, kept]
            assert found.isfinite().all()
            assert torch.equal(batch["input_ids"][number, kept], alone["input_ids"][0])
            if family not in UNEQUAL:
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@families
def test_generation_and_gradients(family):
    model, rows = model_of(family), rows_of(family)
    batch = tiny_batch(model, rows)
    new = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, -4:]
    assert new.shape == (len(rows), 4)
    assert not ((new >= FIRST_SPECIAL) & (new < FIRST_WORD)).any()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@families
def test_images_change_the_logits(family):
    model = model_of(family)
    row = [["image", 2]]
    one, other = (tiny_batch(model, row, row_numbers=[number]) for number in (0, 1))
    other["input_ids"] = one["input_ids"]
    with torch.no_grad():
        logits = [model(**batch).logits[:, -1] for batch in (one, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "mistral3", "internvl", "idefics3", "gemma4"])
def test_images_of_several_sizes(family):
    model = model_of(family)
    small, standard, large = placeholders(
        model, tiny_batch(model, [["small image"], ["image"], ["large image"]])
    )
    assert small < standard < large


def test_token_types():
    batch = tiny_batch(model_of("gemma3"), ROWS)
    assert torch.equal(batch["token_type_ids"], (batch["input_ids"] == 5).long())
    batch = tiny_batch(model_of("paligemma"), ROWS)
    assert not batch["token_type_ids"].any()
    model = model_of("ernie4_5_vl_moe")
    row = tiny_batch(model, [[1, "image", 1]])
    between = slice(1, -1)
    assert row["moe_mm_token_type_ids"][0].tolist() == [0] + [1] * 18 + [0]
    assert row["mm_token_type_ids"][0, between].tolist() == [0] + [1] * 16 + [0]


def test_frames_of_images():
    def shape(family, row):
        """Placeholders as i, marks as |, words as w."""
        model = model_of(family)
        ids = tiny_batch(model, [row])["input_ids"][0].tolist()
        return "".join("i" if t == model.config.image_token_id else "w|"[t < FIRST_WORD] for t in ids)

    image = "i" * 16
    assert shape("llava", [2, "image", 1]) == f"ww{image}w"
    assert shape("qwen2_vl", [2, "image", 1]) == f"ww|{image}|w"
    assert shape("internvl", ["image"]) == f"|{image * 3}|"
    assert shape("idefics3", ["image"]) == f"||{image}" * 3 + "|"
    assert shape("mistral3", ["large image"]) == "iiiiii|" * 4


def test_batches_of_several_images():
    model = model_of("llava_onevision")
    batch = tiny_batch(model, [["image"], [3], ["image", "image"]])
    assert batch["batch_num_images"].tolist() == [1, 2]
    assert batch["pixel_values"].shape[:2] == (3, 3)
    assert not batch["pixel_values"][1:, 1:].any()
    assert tiny_batch(model_of("idefics3"), [["image"], [3]])["pixel_values"].shape[:2] == (2, 3)


def test_seeds():
    model = model_of("llava")
    row = [["image", 3]]
    first, again, other = (tiny_batch(model, row, seed=seed) for seed in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    weights = [tiny_model("llava", seed=seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tiny_batch(tiny_model("llava"), [["image", 3]])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama4", "llava", "qwen3_vl_moe"])
def test_double_precision_is_the_same_model_on_the_same_images(family):
    exact = tiny_model(family, dtype=torch.float64)
    assert exact.dtype == torch.float64
    batch = tiny_batch(exact, ROWS)
    assert batch["pixel_values"].dtype == torch.float64
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = exact(**batch).logits[kept]
        found = model_of(family)(**tiny_batch(model_of(family), ROWS)).logits[kept]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["inkling_mm_model" if "inkling2" in LEFT_OUT else "inkling2", "qwen2_5_vl"]
)
def test_half_precision(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    batch = tiny_batch(model, ROWS)
    with torch.no_grad():
        assert model(**batch).logits[batch["attention_mask"].bool()].isfinite().all()


def test_attention():
    assert tiny_model("llava", attention="eager").config._attn_implementation == "eager"
    assert model_of("llava").config._attn_implementation == "sdpa"


def test_attention_that_a_family_does_not_support():
    assert model_of("got_ocr2").config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModelError, match="'got_ocr2' with attention='sdpa'"):
        tiny_model("got_ocr2", attention="sdpa")


def test_a_family_that_does_not_exist():
    with pytest.raises(UnsupportedModelError, match="no tiny 'llama': transformers has no such"):
        tiny_model("llama")


def test_a_family_without_visual_tokens():
    with pytest.raises(
        UnsupportedModelError, match="no tiny 'mllama': its decoder reads images by cross-attention"
    ):
        tiny_model("mllama")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_family_that_needs_a_missing_package():
    with pytest.raises(UnsupportedModelError, match="timm"):
        tiny_model("fast_vlm")


def test_wrong_rows():
    with pytest.raises(InputError, match="'video'"):
        tiny_batch(model_of("llava"), [["video"]])
    with pytest.raises(InputError, match="padding='middle'"):
        tiny_batch(model_of("llava"), [[3]], padding="middle")
    with pytest.raises(InputError, match="has 0 images: blip-2 takes exactly one"):
        tiny_batch(model_of("blip-2"), [[3]])


def test_every_family_is_either_supported_or_not_with_a_reason():
    assert set(FAMILIES) | UNSUPPORTED.keys() >= MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    assert not set(FAMILIES) & UNSUPPORTED.keys()
    for table in (EXCEPTIONS, RECIPES, FRAMES):
        assert table.keys() <= {*FAMILIES, *LEFT_OUT}
