"""Text decoders with Mamba under LLaVA: as other decoders, or refused with the reason."""

import functools

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer

from skipvision import (
    Engine,
    Request,
    Sampling,
    SkipConfig,
    UnsupportedModelError,
    attach,
    measure_flops,
    predict_cost,
)
from skipvision.anatomy.cache_layers import states_of
from skipvision.kv_cache import cache_bytes
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import ROWS, checkpoint_activations, train_summary
from tests.skipvision.engine.requests_for_tests import ids_of
from tests.skipvision.family_table import since_5_18

pytestmark = since_5_18  # older versions have other caches for Mamba

MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
MAMBA2 |= {"mamba_chunk_size": 16}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
BACKBONES = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA2,
        "layer_types": KINDS,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "residual_multiplier": 0.5,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
}
CONFIG = SkipConfig(retained=5, skipped=4)
NEW = 6


@functools.cache
def build(text):
    model = tiny_llava(text=text, seed=5, **BACKBONES[text])
    model.generation_config.eos_token_id = None
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def masked(model, row):
    """(L, V) logits of a reduced row by the decoder's own forward, with its FFNs' outputs masked."""
    decoder = model.model.language_model
    keep = torch.tensor(row.takes_ffn, dtype=model.dtype)[None, :, None]
    ffns = [
        getattr(layer, name)
        for layer in decoder.layers
        for name in ("feed_forward", "shared_mlp")
        if hasattr(layer, name)
    ]
    handles = [ffn.register_forward_hook(lambda _, args, out: out * keep) for ffn in ffns]
    assert len(handles) == len(decoder.layers)
    out = decoder(
        inputs_embeds=row.embeds,
        position_ids=row.positions[None],
        # Without it, gaps between positions would end a packed document.
        attention_mask=torch.ones(1, len(row.tokens), dtype=torch.long),
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    return model.lm_head(out.last_hidden_state)[0]


def alone(inputs, row):
    """One row of a batch, without padding."""
    images = [sum(part == "image" for part in each) for each in ROWS]
    own = inputs["attention_mask"][row].bool()
    batch = {"input_ids": inputs["input_ids"][row][own][None], "attention_mask": own[own][None].long()}
    first = sum(images[:row])
    pixels = {"pixel_values": inputs["pixel_values"][first : first + images[row]]} if images[row] else {}
    return batch | pixels


def answers(model, inputs):
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return [tuple(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


@torch.no_grad()
@pytest.mark.parametrize("text", BACKBONES)
def test_logits(text):
    model, inputs = build(text), tiny_inputs(ROWS)
    untouched = model(**inputs).logits
    with attach(model, SkipConfig.full()) as skip:
        assert torch.equal(model(**inputs).logits, untouched)
        assert skip.plan.is_identity
    with attach(model, CONFIG) as skip:
        train_summary(skip.summary)
        got = model(**inputs).logits
        assert not torch.equal(got, untouched)
    for number, row in enumerate(naive.prepare(model, inputs, CONFIG, skip.summary)):
        expected = masked(model, row)
        own = inputs["attention_mask"][number].nonzero().flatten().tolist()
        for position, place in zip(own, row.lands, strict=True):
            close(got[number, position], expected[place])


@torch.no_grad()
@pytest.mark.parametrize("text", BACKBONES)
def test_answers_of_generate_and_of_the_engine(text):
    model, inputs = build(text), tiny_inputs(ROWS)
    rows = [alone(inputs, row) for row in range(len(ROWS))]
    with attach(model, CONFIG):
        expected = answers(model, inputs)
        assert [answers(model, row)[0] for row in rows] == expected
    assert len({*expected}) == len(ROWS), "equal answers would prove little"
    requests = [
        Request(inputs=row, sampling=Sampling(max_new_tokens=NEW), key=number)
        for number, row in enumerate(rows)
    ]
    for together in (1, len(ROWS)):
        with Engine(model, None, CONFIG, max_sequences=together) as engine:
            assert {one.key: ids_of(one) for one in engine.run(requests)} == dict(enumerate(expected))


@pytest.mark.parametrize("text", BACKBONES)
def test_gradient_checkpointing_repeats_the_plan(text):
    inputs = tiny_inputs([[3, "image", 4]])
    gradients = []
    for checkpoint in (None, False, True):
        model = tiny_llava(text=text, seed=5, **BACKBONES[text]).train()
        if checkpoint is not None:
            checkpoint_activations(model, use_reentrant=checkpoint)
        model.enable_input_require_grads()
        with attach(model, CONFIG):
            loss = model(**inputs, use_cache=False).logits.logsumexp(dim=-1).sum()
            # A call without images in between: its layers run again, too, and skip nothing.
            loss = loss + model(**tiny_inputs([[6]]), use_cache=False).logits.logsumexp(dim=-1).sum()
            loss.backward()
        layers = model.model.language_model.layers
        gradients.append([weight.grad for weight in layers.parameters() if weight.grad is not None])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "text", [name if name == "bamba" else pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES]
)
def test_cost(text):
    model, seen = build(text), []
    predicted = predict_cost(model.config, CONFIG, text_tokens=40, training=False)
    inputs = tiny_inputs([["image", 40]])
    with torch.no_grad(), attach(model, CONFIG):
        flops = measure_flops(lambda: seen.append(model(**inputs, use_cache=True, logits_to_keep=1)))
    cache = seen[0].past_key_values
    recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [state for layer in recurrent for state in states_of(layer) if state is not None]
    assert predicted.prefill_flops == pytest.approx(flops, rel=0.03)
    assert predicted.kv_bytes == cache_bytes(cache)
    assert predicted.state_bytes == sum(state.nbytes for state in states) > 0


REFUSED = {
    "falcon_h1": (
        {**MAMBA2, "mamba_d_ssm": 64},
        "attention and a recurrence in one layer, which share a layer of the cache",
    ),
    "granitemoehybrid": (
        {**BACKBONES["granitemoehybrid"], "num_local_experts": 4, "num_experts_per_tok": 2},
        "experts next to the feed-forward module",
    ),
    "granitemoeshared": ({"shared_intermediate_size": 64}, "experts next to the feed-forward module"),
    "qwen3_next": (
        {"layer_types": ["linear_attention"] * 3, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        "no layer with attention",
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_decoders_without_the_common_shape_are_refused(text):
    options, reason = REFUSED[text]
    with pytest.raises(UnsupportedModelError) as refusal:
        attach(tiny_llava(text=text, **options), CONFIG)
    assert refusal.value.reason == reason
