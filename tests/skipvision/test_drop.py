"""After `drop_after` no visual token but the summaries is left, in later layers and in their caches."""

import pytest
import torch

from skipvision import (
    ConfigError,
    Engine,
    InputError,
    Request,
    Sampling,
    SkipConfig,
    TokenRole,
    UnsupportedModelError,
    attach,
)
from skipvision.kv_cache import CacheState
from skipvision.testing.families import FAMILIES, tiny_batch, tiny_model
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, close, train_summary
from tests.skipvision.engine.requests_for_tests import ROWS as REQUESTS
from tests.skipvision.engine.requests_for_tests import ids_of, request, words
from tests.skipvision.family_table import LEFT_OUT
from tests.skipvision.test_assisted import prompt

F64 = torch.float64
CONFIG = CONFIGS["drop-after"]


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dtype=F64)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_plan_of_later_layers(model, padding):
    inputs = tiny_inputs(ROWS, padding=padding, dtype=F64)
    with attach(model, CONFIG) as skip:
        model(**inputs)
    plan, later = skip.plan.at_layer(0), skip.plan.at_layer(1)
    assert plan is skip.plan
    assert later is skip.plan.last is skip.plan.at_layer(2)
    assert later.count(TokenRole.TEXT).tolist() == [7, 5, 5]
    assert later.count(TokenRole.SUMMARY).tolist() == [2, 0, 4]
    assert later.roles.shape == (3, 9)
    left = (plan.roles == TokenRole.TEXT) | (plan.roles == TokenRole.SUMMARY)
    for row in range(3):
        real = later.attention_mask[row]
        for name in ("roles", "source", "position_source", "summary_slot"):
            assert torch.equal(getattr(later, name)[row, real], getattr(plan, name)[row, left[row]])
        assert skip.plan.drop.index[row, real].tolist() == left[row].nonzero().squeeze(1).tolist()
        text = inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != 5)
        assert torch.equal(later.merged_into[row] >= 0, text)
        own = later.merged_into[row, text]
        assert later.source[row, own].tolist() == text.nonzero().squeeze(1).tolist()
        assert int(later.removed[row]) == int(inputs["attention_mask"][row].sum()) - int(real.sum())


@torch.no_grad()
def test_later_layers_run_on_what_is_left(model):
    inputs, seen = tiny_inputs(ROWS, dtype=F64), []

    def look(module, args):
        seen.append(args[0].shape[1])

    handles = [
        layer.self_attn.q_proj.register_forward_pre_hook(look) for layer in model.model.language_model.layers
    ]
    with attach(model, CONFIG) as skip:
        out = model(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert seen == [skip.plan.roles.shape[1], 9, 9]
    assert {hidden.shape[1] for hidden in out.hidden_states} == {inputs["input_ids"].shape[1]}
    visual = inputs["input_ids"] == 5
    assert not out.hidden_states[-1][visual].any()


@torch.no_grad()
def test_off_is_the_same_bit_for_bit(model):
    inputs = tiny_inputs(ROWS, dtype=F64)
    with attach(model, SkipConfig(retained=5, skipped=4)) as skip:
        expected = model(**inputs).logits
        with skip.using(CONFIG):
            assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(**inputs).logits, expected)
        assert skip.plan.drop is None
        assert skip.plan.skip_layers is None


@torch.no_grad()
@pytest.mark.parametrize("second", [[2, "image", 3], [4]], ids=["image", "text"])
@pytest.mark.parametrize("name", ["drop-after", "drop-later"])
def test_a_second_turn_continues_the_cache(model, name, second):
    config = CONFIGS[name]
    if len(second) > 1 and config.positions == "contiguous":
        config = config.model_copy(update={"positions": "original"})
    first, second = tiny_inputs([[3, "image", 4]], dtype=F64), tiny_inputs([second], dtype=F64, seed=1)
    with attach(model, config) as skip:
        train_summary(skip.summary)
        cache = model(**first).past_key_values
        alone = {name: value for name, value in second.items() if name != "attention_mask"}
        got = model(**alone, past_key_values=cache).logits
    close(got[0], naive.second_turn(model, first, second, config, skip.summary))


@torch.no_grad()
def test_drafts_do_not_change_the_answer(model):
    inputs = prompt(0)
    with attach(model, CONFIG):
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        actual = model.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2)
    assert actual.tolist() == expected.tolist()


@torch.no_grad()
def test_a_cache_of_another_setting_is_refused(model):
    with attach(model, CONFIG) as skip:
        cache = model(**tiny_inputs([[3, "image", 4]], dtype=F64)).past_key_values
        assert CacheState.of(cache).later.after == 0
        again = tiny_inputs([[1, "image"]], dtype=F64)
        for after in (1, None):
            says = f"drop_after={after}, but this cache was filled with 0"
            other = CONFIG.model_copy(update={"drop_after": after})
            with skip.using(other), pytest.raises(InputError, match=says):
                model(
                    input_ids=again["input_ids"],
                    pixel_values=again["pixel_values"],
                    past_key_values=cache,
                )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_in_the_engine(attention):
    """Gemma's windows are shorter than the prompts here, and layers of both kinds lack tokens."""
    config, other = (
        SkipConfig(retained=4, skipped=6, drop_after=0),
        SkipConfig(retained=4, skipped=6, drop_after=1),
    )
    dtype = F64 if attention == "sdpa" else torch.float32
    model = words("gemma3_text", dtype, attention=attention, sliding_window=8)
    requests, expected = [], {}
    for row in range(len(REQUESTS)):
        for number, skip in enumerate((config, other)):
            one = request(row, key=(row, number), seed=number)
            with attach(model, skip):
                inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in one.inputs.items()}
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            expected[one.key] = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
            requests.append(type(one)(inputs=one.inputs, sampling=one.sampling, skip=skip, key=one.key))
    with Engine(model, None, config, max_sequences=5) as engine:
        for completion in engine.run(requests):
            assert completion.error is None
            assert ids_of(completion) == expected[completion.key]


def test_the_engine_counts_the_bytes_that_later_layers_hold():
    model = words()
    with Engine(model, None, CONFIG) as engine, torch.no_grad():
        [completion] = engine.run([request(0)])
    assert completion.usage.visual_cached == 5 + 2
    entry = 2 * 2 * 8 * 8
    assert completion.usage.kv_bytes == entry * ((7 + 7) + 2 * (7 + 2))


@pytest.mark.parametrize("family", sorted({"qwen3_5", "lfm2_vl"} - {*LEFT_OUT}))
def test_families_that_cannot(family):
    with pytest.raises(UnsupportedModelError, match="something else than keys and values of their own"):
        attach(tiny_model(family), SkipConfig(retained=4, skipped=4, drop_after=0))


@torch.no_grad()
def test_features_of_images_in_later_layers():
    model = tiny_model("qwen3_vl")
    inputs = tiny_batch(model, [["image", 3]])
    wrong = pytest.raises(UnsupportedModelError, match="adds features of images up to layer")
    with attach(model, SkipConfig(retained=2, skipped=2, drop_after=0)), wrong:
        model(**inputs)


def test_attention_without_masks_per_query():
    model = tiny_llava(dtype=F64)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="needs attention that takes a mask per query"):
        attach(model, CONFIG)


HERE = ["gemma3", "qwen2_5_vl", "qwen3_vl", "internvl"]


@pytest.mark.parametrize("family", HERE)
def test_families_decode_on_the_cache_as_without_one(family):
    """Also in the engine: windows, image blocks, three position axes, features in early layers, tiles."""
    check_family(family)


# Without a cache, `generate` passes ernie4_5_vl_moe the token types of the prompt alone.
OTHERS = sorted({*FAMILIES} - {*HERE, *LEFT_OUT, "ernie4_5_vl_moe"})


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_the_other_families(family):
    try:
        check_family(family)
    except UnsupportedModelError as error:
        pytest.skip(str(error))


@torch.no_grad()
def check_family(family):
    model = tiny_model(family, dtype=F64)
    config = SkipConfig(retained=0.3, skipped=0.3, skip_kv=False, drop_after=1)
    inputs = tiny_batch(model, [[3, "image", 4], [5, "image", 2]])
    with attach(model, config) as skip:
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
        assert skip.plan.drop is not None
        alone = tiny_batch(model, [[3, "image", 4]])
        expected = model.generate(**alone, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, again)
    with Engine(model, None, config) as engine:
        [completion] = engine.run([Request(inputs=alone, sampling=Sampling(max_new_tokens=6))])
    assert list(ids_of(completion)) == expected[0, alone["input_ids"].shape[1] :].tolist()
