"""Text decoders of other families under LLaVA: identity, and one case of skipping."""

import pytest
import torch
from transformers import DynamicCache

from skipvision import SkipConfig, UnsupportedModelError, attach
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import ROWS, close, train_summary

BACKBONES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
}
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}
"""Hugging Face's eager attention takes its softmax in float32, and in float64 overflows at padding."""
CONFIG = SkipConfig(retained=5, skipped=4, layout="grouped")


def build(text, attention, **options):
    return tiny_llava(text=text, attention=attention, **BACKBONES[text], **options)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", BACKBONES)
def test_nothing_skipped_is_the_untouched_model(text, attention):
    model, inputs = build(text, attention), tiny_inputs(ROWS)

    def all_of_it():
        ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return [model(**inputs).logits, ids]

    expected = all_of_it()
    with attach(model, SkipConfig.full()) as skip:
        assert all(map(torch.equal, all_of_it(), expected))
        assert skip.plan.is_identity
    with attach(model, CONFIG):
        assert not torch.equal(all_of_it()[0], expected[0])
    assert all(map(torch.equal, all_of_it(), expected))


def same(actual, expected):
    if actual.dtype == torch.float64:
        close(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def masked(model, row, answer=()):
    """(L + n, V) logits of a reduced row and n tokens after it, by the decoder's own forward.

    Its FFNs' outputs are masked, its attention is told who may attend to whom (the answer not to
    skipped tokens). Knows nothing of how a layer is put together.
    """
    decoder, prompt, length = model.model.language_model, len(row.tokens), len(row.tokens) + len(answer)
    words = decoder.get_input_embeddings()(torch.tensor([*answer], dtype=torch.long)[None])
    allowed = naive.causal(length)
    allowed[prompt:, :prompt] = torch.tensor(row.takes_ffn)
    forbidden = torch.zeros(1, 1, length, length, dtype=model.dtype)
    forbidden.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    keep = torch.tensor([*row.takes_ffn, *[True] * len(answer)], dtype=model.dtype)[None, :, None]
    handles = [layer.mlp.register_forward_hook(lambda _, args, out: out * keep) for layer in decoder.layers]
    behind = row.positions[-1] + 1 + torch.arange(len(answer))
    out = decoder(
        inputs_embeds=torch.cat([row.embeds, words], dim=1),
        attention_mask=forbidden,
        position_ids=torch.cat([row.positions, behind])[None],
        use_cache=False,
    )
    for handle in handles:
        handle.remove()
    return model.lm_head(out.last_hidden_state)[0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", BACKBONES)
def test_skipping_is_masking(text, attention):
    model = build(text, attention, dtype=DTYPES[attention])
    inputs = tiny_inputs(ROWS, dtype=DTYPES[attention])
    with attach(model, CONFIG) as skip:
        train_summary(skip.summary)
        got = model(**inputs).logits
    for number, row in enumerate(naive.prepare(model, inputs, CONFIG, skip.summary)):
        expected = masked(model, row)
        own = inputs["attention_mask"][number].nonzero().flatten().tolist()
        for position, place in zip(own, row.lands, strict=True):
            same(got[number, position], expected[place])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", BACKBONES)
def test_pruned_generation_equals_masked_generation(text, attention):
    """The next token's logits on the pruned cache, from one masked forward over prompt and answer."""
    model = build(text, attention, dtype=DTYPES[attention])
    inputs = tiny_inputs([[3, "image", 4]], dtype=DTYPES[attention])
    config, logits = SkipConfig(retained=5, skipped=4), []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: logits.append(out[0, -1]))
    with attach(model, config) as skip:
        out = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
        )
    handle.remove()
    assert out.past_key_values.get_seq_length() == int(skip.plan.cache_mask.sum()) + 2
    (row,) = naive.prepare(model, inputs, config, skip.summary)
    expected = masked(model, row, out.sequences[0, 23:-1].tolist())[-3:]
    for step in range(3):
        same(logits[step], expected[step])


def test_a_sliding_window_longer_than_the_text_changes_nothing():
    """Mistral's default config has a sliding window; a pruned cache keeps every entry."""
    sliding, inputs = tiny_llava(text="mistral", sliding_window=100), tiny_inputs(ROWS)
    plain = tiny_llava(text="mistral", sliding_window=None)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with attach(plain, CONFIG):
        expected = plain.generate(**inputs, **options)
        logits = plain(**inputs).logits
    with attach(sliding, CONFIG):
        assert torch.equal(sliding.generate(**inputs, **options), expected)
        torch.testing.assert_close(sliding(**inputs, use_cache=False).logits, logits)
        assert torch.equal(sliding.generate(**inputs, **options, past_key_values=DynamicCache()), expected)


def test_a_window_that_has_dropped_entries_is_refused():
    model = tiny_llava(text="mistral", sliding_window=4)
    cache = model(**tiny_inputs([[9]]), use_cache=True).past_key_values
    inputs = tiny_inputs([["image", 3]])
    del inputs["attention_mask"]
    with attach(model, CONFIG), pytest.raises(UnsupportedModelError, match="keeps a window of 4 tokens"):
        model(**inputs, past_key_values=cache)
