"""Decoding on the pruned cache equals decoding on a full cache whose mask hides the skipped keys."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from skipvision import InputError, SkipConfig, TokenRole, attach
from skipvision.kv_cache import CacheState, cache_bytes
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, close, train_summary
from tests.skipvision.family_table import BEFORE_5_18

F64 = torch.float64
NEW = 4
# Before transformers 5.18, `generate` mixes up the images of a row that has several when it repeats rows.
REPEATED = [*ROWS[:2], ["image", 5]] if BEFORE_5_18 else ROWS
HERE = [
    "counts",
    "no-summary",
    "three-summaries",
    "drop",
    "grouped",
    "contiguous",
    "grouped-contiguous",
    "ffn-for-all",
    "cache-for-all",
    "skipped-only",
    "ffn-ratio",
    "drop-after",
    "drop-later",
    "sized",
    "sized-in-cache",
    "sized-drop-later",
]


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dtype=F64)


@pytest.fixture
def inputs():
    return tiny_inputs(ROWS, dtype=F64)


def generate(model, inputs, **options):
    """Return generate's output, and the logits of each step in float64 (generate itself rounds them)."""
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    logits = []
    handle = model.lm_head.register_forward_hook(lambda _, args, out: logits.append(out[:, -1]))
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    handle.remove()
    assert len(logits) == NEW
    return out, logits


def assert_decoded_like_the_masked_cache(model, inputs, config, summary, out, logits, copies=1):
    """Return the reference's logits of every step and row, given the chosen tokens."""
    rows = naive.prepare(model, inputs, config, summary, from_zero=True)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert len(answers) == copies * len(rows)
    for number, answer in enumerate(answers):
        expected = naive.decode(model, rows[number // copies], config, answer)
        for step, expected_logits in enumerate(expected):
            close(logits[step][number], expected_logits)


@torch.no_grad()
@pytest.mark.parametrize("name", HERE)
def test_pruned_decoding_is_decoding_with_masked_keys(model, inputs, name):
    config = CONFIGS[name]
    with attach(model, config) as skip:
        train_summary(skip.summary)
        out, logits = generate(model, inputs)
    assert_decoded_like_the_masked_cache(model, inputs, config, skip.summary, out, logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous"])
def test_rows_that_share_a_prompt_decode_apart(model, name):
    config, inputs = CONFIGS[name], tiny_inputs(REPEATED, dtype=F64)
    with attach(model, config) as skip:
        out, logits = generate(model, inputs, do_sample=True, num_return_sequences=2, temperature=2.0)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    assert_decoded_like_the_masked_cache(model, inputs, config, skip.summary, out, logits, copies=2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous", "cache-for-all", "drop-after", "sized-in-cache"])
def test_beams_keep_their_own_caches(model, name):
    """A beam's score is the sum of its tokens' log-probabilities on its own cache."""
    config, inputs = CONFIGS[name], tiny_inputs(REPEATED, dtype=F64)
    with attach(model, config) as skip:
        out, _ = generate(model, inputs, num_beams=3, num_return_sequences=3, length_penalty=0.0)
    rows = naive.prepare(model, inputs, config, skip.summary, from_zero=True)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    for number, answer in enumerate(answers):
        logits = naive.decode(model, rows[number // 3], config, answer)
        score = sum(one.log_softmax(-1)[token] for one, token in zip(logits, answer, strict=True))
        torch.testing.assert_close(out.sequences_scores[number].double(), score, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", HERE)
def test_cached_generation_is_uncached_generation(model, inputs, name):
    """Generation without a cache forgets nothing, so both runs keep the skipped keys."""
    config = CONFIGS[name].model_copy(update={"skip_kv": False})
    with attach(model, config):
        cached, logits = generate(model, inputs)
        uncached, all_over = generate(model, inputs, use_cache=False)
    assert uncached.past_key_values is None
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(logits, all_over, strict=True):
        close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("name", HERE)
def test_the_cache_holds_the_planned_entries_and_no_byte_more(model, inputs, name):
    with attach(model, CONFIGS[name]) as skip:
        out, _ = generate(model, inputs)
    # The last token is sampled but not fed.
    config = model.config.text_config
    entries = [
        int(skip.plan.at_layer(number).cache_mask.sum(dim=1).max()) + NEW - 1
        for number in range(config.num_hidden_layers)
    ]
    per_entry = 2 * config.num_key_value_heads * config.head_dim * 8
    cache = out.past_key_values
    assert [cache.get_seq_length(number) for number in range(config.num_hidden_layers)] == entries
    assert cache_bytes(cache) == len(ROWS) * sum(entries) * per_entry
    full = inputs["input_ids"].shape[1] + NEW - 1
    assert max(entries) < full, "generate must have applied the plan"


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_pruned_entries_are_freed(model, padding):
    inputs = tiny_inputs(ROWS, padding=padding, dtype=F64)
    cache = DynamicCache(config=model.config.text_config)
    full = []

    def look(layer, *_):
        held = cache.layers[layer.self_attn.layer_idx]
        full.extend(weakref.ref(tensor) for tensor in (held.keys, held.values))

    with attach(model, CONFIGS["counts"]) as skip:
        handles = [layer.register_forward_hook(look) for layer in model.model.language_model.layers]
        model(**inputs, past_key_values=cache)
        for handle in handles:
            handle.remove()
    gc.collect()
    assert [reference() for reference in full] == [None] * 6
    kept = int(skip.plan.cache_mask.sum(dim=1).max())
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.shape == (3, 2, kept, 8)
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 8


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_kept_entries_are_the_full_caches_unchanged(model, padding):
    inputs = tiny_inputs(ROWS, padding=padding, dtype=F64)
    config = CONFIGS["counts"]
    with attach(model, config.model_copy(update={"skip_kv": False})) as skip:
        full = model(**inputs, use_cache=True).past_key_values
    plan = skip.plan
    with attach(model, config) as skip:
        pruned = model(**inputs, use_cache=True).past_key_values
    kept = skip.plan.cache_mask
    assert full.get_seq_length() == plan.roles.shape[1]
    for before, after in zip(full.layers, pruned.layers, strict=True):
        for row in range(len(ROWS)):
            own = int(kept[row].sum())
            assert torch.equal(after.keys[row, :, -own:], before.keys[row][:, kept[row]])
            assert torch.equal(after.values[row, :, -own:], before.values[row][:, kept[row]])


def prefill(model, inputs):
    out = model(**inputs, use_cache=True)
    return out.past_key_values, out.logits[:, -1]


ANSWER = [7, IMAGE_TOKEN, 9, 30]
"""Sampling may produce "<image>": without pixels it is an ordinary word."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous"])
def test_a_custom_loop_needs_neither_mask_nor_positions(model, name):
    inputs = tiny_inputs([[3, "image", 4]], dtype=F64)
    config = CONFIGS[name]
    with attach(model, config) as skip:
        cache, logits = prefill(model, inputs)
        words = [{"input_ids": torch.tensor([[token]])} for token in ANSWER[:-1]]
        got = [logits, *(model(**word, past_key_values=cache).logits[:, -1] for word in words)]
    (row,) = naive.prepare(model, inputs, config, skip.summary)
    for actual, expected in zip(got, naive.decode(model, row, config, ANSWER), strict=True):
        close(actual[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous"])
def test_a_custom_loop_with_the_full_length_mask(model, inputs, name):
    """As generate calls it, with mask and positions of the caller's unreduced sequence."""
    config = CONFIGS[name]
    mask = inputs["attention_mask"]
    with attach(model, config) as skip:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = model(**inputs, position_ids=positions, use_cache=True)
        got = [out.logits[:, -1]]
        for token in ANSWER[:-1]:
            mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
            out = model(
                input_ids=torch.full((3, 1), token),
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
            )
            got.append(out.logits[:, -1])
    for number, row in enumerate(naive.prepare(model, inputs, config, skip.summary, from_zero=True)):
        for actual, expected in zip(got, naive.decode(model, row, config, ANSWER), strict=True):
            close(actual[number], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous"])
def test_several_tokens_at_once_after_a_pruned_cache(model, inputs, name):
    """The second turn of a chat."""
    words = torch.tensor([[7, 8, 9]] * 3)
    with attach(model, CONFIGS[name]):
        cache, _ = prefill(model, inputs)
        one_by_one = [model(input_ids=words[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        cache, _ = prefill(model, inputs)
        at_once = model(input_ids=words, past_key_values=cache).logits
    close(at_once, torch.cat(one_by_one, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "no-summary", "drop", "cache-for-all", "grouped"])
def test_a_second_turn_may_have_another_image(model, name):
    config = CONFIGS[name]
    first = tiny_inputs([[3, "image", 4]], dtype=F64)
    second = tiny_inputs([[2, "image", 3]], dtype=F64, seed=1)
    with attach(model, config) as skip:
        cache, _ = prefill(model, first)
        got = model(
            input_ids=second["input_ids"], pixel_values=second["pixel_values"], past_key_values=cache
        ).logits
        after = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    decoder = model.model.language_model
    (row,), (turn,) = (naive.prepare(model, i, config, skip.summary) for i in (first, second))
    full = DynamicCache()
    naive.run_row(model, row, config, full)

    def seen(tokens):
        return [not (config.skip_kv and token.role == TokenRole.SKIPPED) for token in tokens]

    earlier = torch.tensor(seen(row.tokens)).expand(len(turn.tokens), -1)
    allowed = torch.cat([earlier, naive.causal(len(turn.tokens))], dim=1)
    states = decoder.norm(
        naive.run_layers(
            decoder, decoder.layers, turn.embeds, turn.positions + 23, allowed, turn.takes_ffn, full
        )
    )[0]
    for position, place in enumerate(turn.lands):
        if place >= 0:
            close(got[0, position], model.lm_head(states[place]))
    last = torch.tensor([[*seen(row.tokens), *seen(turn.tokens), True]])
    word = model.get_input_embeddings()(torch.tensor([[7]]))
    hidden = naive.run_layers(decoder, decoder.layers, word, torch.tensor([44]), last, [True], full)
    close(after[0], model.lm_head(decoder.norm(hidden))[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["counts", "contiguous", "ffn-ratio"])
def test_a_second_turn_does_not_depend_on_other_rows(model, name):
    first = tiny_inputs([["image", "image", 2], [9]], dtype=F64)
    second = tiny_inputs([[2, "image", 3], [1, "image", 4]], dtype=F64, seed=1)
    masks = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    positions = (masks.cumsum(dim=1) - 1).clamp(min=0).split([34, 21], dim=1)
    with attach(model, CONFIGS[name]) as skip:
        out = model(**first, position_ids=positions[0], use_cache=True)
        second["attention_mask"] = masks
        together = model(**second, position_ids=positions[1], past_key_values=out.past_key_values).logits
        plan = skip.plan
        alone = model(input_ids=first["input_ids"][1:, -9:], use_cache=True)
        alone = model(
            input_ids=second["input_ids"][1:],
            pixel_values=second["pixel_values"][1:],
            past_key_values=alone.past_key_values,
        ).logits
    assert torch.equal(plan.roles[1:], skip.plan.roles)
    assert torch.equal(plan.source[1:], skip.plan.source)
    close(together[1:], alone)


@torch.no_grad()
def test_generations_can_be_interleaved(model):
    config = CONFIGS["contiguous"]
    rows = [[3, "image", 4]], [["image", "image", 9]]
    prompts = [tiny_inputs(row, dtype=F64, seed=seed) for seed, row in enumerate(rows)]
    with attach(model, config) as skip:
        caches, got = [], [[], []]
        for number, prompt in enumerate(prompts):
            cache, logits = prefill(model, prompt)
            caches.append(cache)
            got[number].append(logits[0])
        for token in ANSWER[:-1]:
            for number, cache in enumerate(caches):
                out = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
                got[number].append(out.logits[0, -1])
    for number, prompt in enumerate(prompts):
        (row,) = naive.prepare(model, prompt, config, skip.summary)
        for actual, expected in zip(got[number], naive.decode(model, row, config, ANSWER), strict=True):
            close(actual, expected)


@torch.no_grad()
def test_an_emptied_cache_can_be_used_again(model):
    inputs = tiny_inputs([[3, "image", 4]], dtype=F64)
    words = {"input_ids": torch.tensor([[7, 8, 9]])}
    with attach(model, CONFIGS["contiguous"]):
        expected = model(**words).logits
        cache, _ = prefill(model, inputs)
        assert CacheState.of(cache) is not None
        cache.reset()
        assert CacheState.of(cache) is None
        assert torch.equal(model(**words, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_mask_that_does_not_fit_the_pruned_cache_is_refused(model):
    inputs = tiny_inputs([[3, "image", 4]], dtype=F64)
    with attach(model, CONFIGS["counts"]):
        cache, _ = prefill(model, inputs)
        with pytest.raises(InputError, match=r"\(1, 15\).* \(1, 24\), all positions fed"):
            model(
                input_ids=torch.tensor([[7]]),
                attention_mask=torch.ones(1, 15, dtype=torch.long),
                past_key_values=cache,
            )


@torch.no_grad()
def test_contiguous_positions_have_no_gaps(model, inputs):
    """Prefill numbers the survivors without gaps, and decoding continues after them."""
    rotary = model.model.language_model.rotary_emb
    seen = []
    with attach(model, CONFIGS["contiguous"]) as skip:
        handle = rotary.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        generate(model, inputs)
        handle.remove()
    lengths = skip.plan.attention_mask.sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        assert seen[0][row, -length:].tolist() == list(range(length))
        assert [int(step.expand(3, 1)[row, 0]) for step in seen[1:]] == [length, length + 1, length + 2]


@torch.no_grad()
def test_original_positions_are_those_of_the_unreduced_sequence(model, inputs):
    rotary = model.model.language_model.rotary_emb
    seen = []
    with attach(model, CONFIGS["counts"]) as skip:
        handle = rotary.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        generate(model, inputs)
        handle.remove()
    caller = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    real = skip.plan.attention_mask
    for row in range(3):
        expected = caller[row, skip.plan.position_source[row, real[row]]]
        assert torch.equal(seen[0][row, real[row]], expected)
        length = int(inputs["attention_mask"][row].sum())
        assert [int(step.expand(3, 1)[row, 0]) for step in seen[1:]] == [length, length + 1, length + 2]


@torch.no_grad()
def test_a_plain_generation_follows_a_skipping_one(model, inputs):
    """The attachment leaves the caches of other generations alone."""
    text = tiny_inputs([[5]], dtype=F64)
    plain, _ = generate(model, text)
    with attach(model, SkipConfig(retained=4, skipped=4)):
        generate(model, inputs)
        assert torch.equal(generate(model, text)[0].sequences, plain.sequences)
