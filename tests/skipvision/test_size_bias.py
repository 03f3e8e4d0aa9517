"""With `size_bias`, a merged token weighs in attention as much as the tokens that it holds."""

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface

from skipvision import ConfigError, Engine, Request, Sampling, SkipConfig, UnsupportedModelError, attach
from skipvision.anatomy.families import dissect
from skipvision.kv_cache import CacheState
from skipvision.testing.families import FAMILIES, tiny_batch, tiny_model
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, close, labels_for, train_summary
from tests.skipvision.engine.requests_for_tests import ids_of
from tests.skipvision.family_table import LEFT_OUT
from tests.skipvision.test_assisted import prompt

F64 = torch.float64


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dtype=F64)


def sized(config: SkipConfig, on: bool = True) -> SkipConfig:
    return config.model_copy(update={"size_bias": on})


@torch.no_grad()
@pytest.mark.parametrize("name", ["drop", "nothing-merged", "summaries-alone", "attention-later"])
def test_without_merged_tokens_it_changes_no_bit(model, name):
    inputs = tiny_inputs(ROWS, dtype=F64)
    with attach(model, CONFIGS[name]) as skip:
        expected = model(**inputs).logits
        with skip.using(sized(CONFIGS[name])):
            assert torch.equal(model(**inputs).logits, expected)
        assert skip.plan.sizes is None


@torch.no_grad()
def test_off_is_the_same_bit_for_bit(model):
    inputs, off = tiny_inputs(ROWS, dtype=F64), CONFIGS["counts"]
    with attach(model, off) as skip:
        expected = model(**inputs).logits
        with skip.using(sized(off)):
            assert not torch.allclose(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
        assert skip.plan.sizes is None


@torch.no_grad()
def test_sizes_are_those_of_the_plan(model):
    """Text, summaries and padding count as one; the tokens of an image count as its 16 together."""
    with attach(model, CONFIGS["sized"]) as skip:
        model(**tiny_inputs(ROWS, dtype=F64))
    plan = skip.plan
    visual = plan.group >= 0
    assert (plan.sizes[~visual] == 1).all()
    assert torch.equal(plan.sizes[visual], plan.mass[visual])
    assert [int(plan.sizes[row][visual[row]].sum()) for row in range(3)] == [16, 0, 32]


@torch.no_grad()
@pytest.mark.parametrize("skipped", [4, 0], ids=["merged-into-skipped", "merged-into-retained"])
def test_the_cache_remembers_the_sizes_that_stay(model, skipped):
    """If all merged tokens have left the cache, decoding needs no mask of its own."""
    with attach(model, SkipConfig(retained=5, skipped=skipped, size_bias=True)):
        cache = model(**tiny_inputs(ROWS, dtype=F64)).past_key_values
    sizes = CacheState.of(cache).sizes
    assert (sizes is None) is bool(skipped)
    if sizes is not None:
        # 16 of each image, one summary each, text, and padding up to the longest row's 17.
        assert sizes.sum(dim=1).tolist() == [16 + 1 + 7 + 4, 5 + 12, 2 * 17 + 5]


@torch.no_grad()
@pytest.mark.parametrize("second", [[2, "image", 3], [4]], ids=["image", "text"])
@pytest.mark.parametrize("name", ["sized-in-cache", "sized-drop-later"])
def test_a_second_turn_continues_the_cache(model, name, second):
    config = CONFIGS[name]
    first, second = tiny_inputs([[3, "image", 4]], dtype=F64), tiny_inputs([second], dtype=F64, seed=1)
    with attach(model, config) as skip:
        train_summary(skip.summary)
        cache = model(**first).past_key_values
        alone = {name: value for name, value in second.items() if name != "attention_mask"}
        got = model(**alone, past_key_values=cache).logits
    close(got[0], naive.second_turn(model, first, second, config, skip.summary))


@torch.no_grad()
def test_drafts_do_not_change_the_answer(model):
    """The sizes follow when `generate` crops wrong drafts from the cache."""
    inputs = prompt(0)
    with attach(model, CONFIGS["sized-in-cache"]):
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        actual = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2)
    assert actual.tolist() == expected.tolist()


def test_training_under_autocast():
    """The bias takes the precision that attention computes in."""
    config = CONFIGS["sized"].model_copy(update={"skip_kv": False})
    model, inputs = tiny_llava(dtype=torch.float32).train(), tiny_inputs(ROWS)
    with attach(model, config) as skip, torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=labels_for(inputs), use_cache=False).loss
    loss.backward()
    assert skip.plan.sizes is not None
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("family", sorted({"qwen3_5", "lfm2_vl"} - {*LEFT_OUT}))
def test_families_that_cannot(family):
    with pytest.raises(UnsupportedModelError, match=r"size_bias=True: .* and take no bias: set size_bias"):
        attach(tiny_model(family), SkipConfig(retained=4, skipped=4, size_bias=True))


def test_attention_without_masks_per_query():
    model = tiny_llava(dtype=F64)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="size_bias=True needs attention that takes a mask per query, not"):
        attach(model, CONFIGS["sized"])


HERE = ["gemma3", "qwen2_5_vl", "qwen3_vl", "internvl"]


@pytest.mark.parametrize("family", HERE)
def test_families_decode_on_the_cache_as_without_one(family, monkeypatch):
    """Also in the engine: windows, image blocks, three position axes, features in early layers, tiles."""
    check_family(family, monkeypatch)


# Without a cache, `generate` passes ernie4_5_vl_moe the token types of the prompt alone.
OTHERS = sorted({*FAMILIES} - {*HERE, *LEFT_OUT, "ernie4_5_vl_moe"})


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_the_other_families(family, monkeypatch):
    try:
        check_family(family, monkeypatch)
    except UnsupportedModelError as error:
        pytest.skip(str(error))


@torch.no_grad()
def check_family(family, monkeypatch):
    """In prefill and in decoding, the attention of every layer gets the bias of every key that it sees."""
    model = tiny_model(family, dtype=F64)
    config = SkipConfig(retained=0.3, skipped=0.3, skip_kv=False, size_bias=True)
    alone = tiny_batch(model, [[3, "image", 4]])
    inputs = tiny_batch(model, [[3, "image", 4], [5, "image", 2]])
    with attach(model, config) as skip:
        with monkeypatch.context() as patched:
            given = masks_given(patched)
            cached = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert len(given) == 3 * len(dissect(model).layers)
        bias = skip.plan.sizes.to(F64).log()
        assert bias.any()
        for mask in given:
            own = functional.pad(bias, (0, mask.shape[3] - bias.shape[1]))[:, None, None].expand_as(mask)
            seen = mask > torch.finfo(F64).min
            assert torch.equal(mask[seen], own[seen])
        again = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
        expected = model.generate(**alone, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, again)
    with Engine(model, None, config) as engine:
        [completion] = engine.run([Request(inputs=alone, sampling=Sampling(max_new_tokens=6))])
    assert list(ids_of(completion)) == expected[0, alone["input_ids"].shape[1] :].tolist()


def masks_given(patched):
    """Return a list that collects the floating-point masks that attention gets."""
    given, attend = [], AttentionInterface._global_mapping["sdpa"]

    def watch(module, query, key, value, attention_mask, **options):
        if attention_mask is not None and attention_mask.is_floating_point():
            given.append(attention_mask)
        return attend(module, query, key, value, attention_mask, **options)

    patched.setitem(AttentionInterface._global_mapping, "sdpa", watch)
    return given
