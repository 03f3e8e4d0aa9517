"""Assisted decoding: drafts are checked in one call, the first of them in the prefill, wrong ones cropped."""

import functools

import pytest
import torch

from skipvision import InputError, SkipConfig, attach
from skipvision.testing.families import tiny_batch
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.families.matrix import model_of

CONFIGS = {
    "summaries": SkipConfig(retained=4, skipped=5),
    "contiguous": SkipConfig(retained=3, skipped=4, summary_tokens=0, positions="contiguous"),
    "cached": SkipConfig(retained=4, skipped=5, skip_kv=False),
    "attention": SkipConfig(retained=4, skipped=5, select="attention"),
}


@functools.cache
def model():
    made = tiny_llava(seed=3, dtype=torch.float64)
    made.generation_config.eos_token_id = None
    return made


def prompt(seed):
    """A prompt whose last words occurred before, so that the first call has drafts already."""
    inputs = tiny_inputs([[3, "image", 4]], seed=seed, dtype=torch.float64)
    words = inputs["input_ids"][:, -4:]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words, words], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 2},
        {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1},
        {"assistant": 3},
        {"assistant": 1},
    ],
    ids=["lookup", "long lookup", "right drafts", "wrong drafts"],
)
def test_drafts_do_not_change_the_answer(how, config):
    how = dict(how)
    if "assistant" in how:
        how["assistant_model"] = tiny_llava(seed=how.pop("assistant"), dtype=torch.float64)
    for seed in range(3):
        inputs = prompt(seed)
        with attach(model(), CONFIGS[config]):
            expected = model().generate(**inputs, max_new_tokens=20, do_sample=False)
            actual = model().generate(**inputs, max_new_tokens=20, do_sample=False, **how)
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_5_vl"])
def test_drafts_in_other_families(family):
    model, config = model_of(family), SkipConfig(retained=0.3, skipped=0.3)
    batch = tiny_batch(model, [[3, "image", 4]])
    options = {"max_new_tokens": 12, "do_sample": False}
    with attach(model, config):
        expected = model.generate(**batch, **options)
        assert model.generate(**batch, **options, prompt_lookup_num_tokens=3).tolist() == expected.tolist()


@torch.no_grad()
def test_a_pruned_cache_is_cropped_down_to_its_last_image():
    inputs = prompt(0)
    with attach(model(), CONFIGS["summaries"]):
        cache = model()(**inputs, use_cache=True).past_key_values
        expected = model()(input_ids=torch.tensor([[40]]), past_key_values=cache).logits
        model()(input_ids=torch.tensor([[41, 42]]), past_key_values=cache)
        cache.crop(-3)
        actual = model()(input_ids=torch.tensor([[40]]), past_key_values=cache).logits
        torch.testing.assert_close(actual, expected)
        short = {name: value[:, :-5] for name, value in inputs.items() if name != "pixel_values"}
        cut = model()(**short, pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
        five = inputs["input_ids"][:, -5:]
        expected = model()(input_ids=five, past_key_values=cut).logits
        cache.crop(-6)
        actual = model()(input_ids=five, past_key_values=cache).logits
        assert actual.shape == expected.shape
        cache.crop(-14)
        with pytest.raises(InputError, match="cropped by 9 entries, into its images"):
            model()(input_ids=five, past_key_values=cache)
