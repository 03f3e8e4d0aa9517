"""Assisted decoding: drafts are checked in one call, the first of them in the prefill, wrong ones cropped."""

import copy
import functools

import pytest
import torch

from skipvision import ConfigError, InputError, SkipConfig, attach
from skipvision.kv_cache import CacheState
from skipvision.testing.families import tiny_batch, tiny_model
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.families.matrix import model_of
from tests.skipvision.family_table import LEFT_OUT, since_5_18
from tests.skipvision.test_recurrent_backbones import BACKBONES

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


def repeated(model, times):
    """A batch of a model, in float64, whose last four words are repeated."""
    batch = tiny_batch(model, [[3, "image", 4]])
    length, words = batch["input_ids"].shape[1], batch["input_ids"][:, -4:]
    for name, value in batch.items():
        if value.is_floating_point():
            batch[name] = value.double()
        elif value.shape == (1, length):
            more = words.repeat(1, times) if name == "input_ids" else value[:, -1:].expand(-1, 4 * times)
            batch[name] = torch.cat([value, more], dim=1)
    return batch


@pytest.mark.skipif("unlimited_ocr" in LEFT_OUT, reason="this transformers has no such family")
@pytest.mark.parametrize("drafted", [3, 30], ids=["fewer than the window", "more than the window"])
def test_drafts_of_the_first_call_leave_a_window_as_words_do(drafted):
    """Tokens of the first call are never forgotten, but its drafts are words of the answer."""
    model = tiny_model("unlimited_ocr", dtype=torch.float64)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = None
    batch, calls = repeated(model, 2 if drafted == 3 else 8), []
    *_, first, second, third, fourth = batch["input_ids"][0].tolist()
    cycle = [(first, second), (second, third), (third, fourth), (fourth, first)]
    options = {
        "max_new_tokens": 2 * model.config.get_text_config().sliding_window,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        # The answer repeats the words, so that drafts are right.
        "sequence_bias": dict.fromkeys(cycle, 50.0),
    }
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with attach(model, SkipConfig(retained=0.3, skipped=0.3)):
        actual = model.generate(**batch, **options, prompt_lookup_num_tokens=drafted)
        assert calls[0] == batch["input_ids"].shape[1] + drafted
        expected = model.generate(**batch, **options)
    torch.testing.assert_close(torch.cat(actual.logits), torch.cat(expected.logits))
    assert actual.sequences.tolist() == expected.sequences.tolist()
    length = batch["input_ids"].shape[1]
    assert CacheState.of(actual.past_key_values).first.tolist() == [length]


def no_work(model):
    """Make every layer of the model fail that runs."""

    def fail(*_):
        raise AssertionError("work was done")

    for part in model.modules():
        if not list(part.children()):
            part.register_forward_pre_hook(fail)


DRAFTS = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda: {"assistant_model": tiny_llava(seed=1)},
}


@since_5_18
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("text", BACKBONES)
def test_drafts_are_refused_where_states_cannot_be_restored(text, drafts):
    """transformers refuses them by the outer class, and LLaVA says nothing of its decoder."""
    model = tiny_llava(text=text, **BACKBONES[text])
    with attach(model, CONFIGS["cached"]):
        no_work(model)
        with pytest.raises(ConfigError, match=r"Model has recurrent states, .* leave out prompt_lookup"):
            model.generate(**tiny_inputs([[3, "image", 4]]), **DRAFTS[drafts]())


@pytest.mark.skipif("ernie4_5_vl_moe" in LEFT_OUT, reason="this transformers has no such family")
def test_drafts_are_refused_where_tokens_have_kinds():
    model = tiny_model("ernie4_5_vl_moe")
    batch = tiny_batch(model, [[3, "image", 4]])
    with attach(model, SkipConfig(retained=0.3, skipped=0.3)):
        no_work(model)
        with pytest.raises(ConfigError, match="the kind of each token of the prompt, and drafts have none"):
            model.generate(**batch, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_drafts_are_refused_on_a_filled_cache(drafts):
    options = {"max_new_tokens": 6, "do_sample": False}
    with attach(model(), CONFIGS["summaries"]):
        first = model().generate(**prompt(0), **options, return_dict_in_generate=True)
        cache, ids = first.past_key_values, torch.cat([first.sequences, torch.tensor([[9, 10, 9]])], dim=1)
        entries = cache.get_seq_length()
        with pytest.raises(ConfigError, match=rf"past_key_values has {entries} entries: .* an empty cache"):
            model().generate(input_ids=ids, past_key_values=cache, **options, **DRAFTS[drafts]())
        assert cache.get_seq_length() == entries
        model().generate(input_ids=ids, past_key_values=cache, **options)
