"""The tiny models of all families: that they and their inputs are what a conformance suite takes them for."""

from __future__ import annotations

import functools

import pytest
import torch

from skipvision.errors import InputError, UnsupportedModelError
from skipvision.tiny_configs import FIRST_SPECIAL, FIRST_WORD
from skipvision.tiny_families import FAMILIES, tiny_batch, tiny_model

ROWS = [[3, "image", 4], [5], ["image", 2, "small image", 3], [2, "large image", 1]]
RUNNING = [
    "aya_vision",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "gemma3",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "idefics3",
    "internvl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "vipllava",
]
families = pytest.mark.parametrize("family", RUNNING)


@functools.cache
def model_of(family):
    return tiny_model(family)


def placeholders(model, batch):
    return (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()


@families
def test_models_are_small_finite_and_in_eval_mode(family):
    model = model_of(family)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.training
    assert model.config.get_text_config().num_hidden_layers == 3


@families
def test_a_row_is_the_same_alone_and_in_a_batch_of_either_padding(family):
    model = model_of(family)
    batches = {padding: tiny_batch(model, ROWS, padding=padding) for padding in ("left", "right")}
    with torch.no_grad():
        logits = {padding: model(**batch).logits for padding, batch in batches.items()}
    for number, row in enumerate(ROWS):
        alone = tiny_batch(model, [row], row_numbers=[number])
        assert alone["attention_mask"].all()
        with torch.no_grad():
            expected = model(**alone).logits[0]
        assert expected.isfinite().all()
        for padding, batch in batches.items():
            kept = batch["attention_mask"][number].bool()
            assert torch.equal(batch["input_ids"][number, kept], alone["input_ids"][0])
            torch.testing.assert_close(logits[padding][number, kept], expected, rtol=1e-3, atol=1e-4)


@families
def test_generation_and_gradients(family):
    model = model_of(family)
    batch = tiny_batch(model, ROWS)
    new = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert new.shape == (len(ROWS), 4)
    assert not ((new >= FIRST_SPECIAL) & (new < FIRST_WORD)).any()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@families
def test_the_pictures_matter(family):
    model = model_of(family)
    row = [["image", 2]]
    one, other = (tiny_batch(model, row, row_numbers=[number]) for number in (0, 1))
    other["input_ids"] = one["input_ids"]
    with torch.no_grad():
        logits = [model(**batch).logits[:, -1] for batch in (one, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "mistral3", "internvl"])
def test_images_of_several_sizes(family):
    model = model_of(family)
    small, standard, large = placeholders(
        model, tiny_batch(model, [["small image"], ["image"], ["large image"]])
    )
    assert small < standard < large


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


def test_dtype_and_attention():
    model = tiny_model("llava", dtype=torch.float64, attention="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    assert tiny_batch(model, [["image"]])["pixel_values"].dtype == torch.float64


def test_a_family_that_transformers_does_not_have():
    with pytest.raises(UnsupportedModelError, match="'llama' is no image-text-to-text family"):
        tiny_model("llama")


def test_a_family_that_needs_a_missing_package():
    with pytest.raises(UnsupportedModelError, match="timm"):
        tiny_model("fast_vlm")


def test_a_row_with_something_else():
    with pytest.raises(InputError, match="'video'"):
        tiny_batch(model_of("llava"), [["video"]])


def test_the_families_are_those_of_transformers():
    assert set(RUNNING) <= set(FAMILIES)
