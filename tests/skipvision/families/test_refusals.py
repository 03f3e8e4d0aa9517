"""Calls that Skip-Vision cannot reduce raise a typed error or warn, whatever the family's code does."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from skipvision import ConfigError, InputError, SkipConfig, UnsupportedModelError, attach
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.families.matrix import model_of
from tests.skipvision.families.running import labels_of
from tests.skipvision.family_table import LEFT_OUT, since_5_18

CONFIG = SkipConfig(retained=0.3, skipped=0.3, select="norm")
ROW = [[3, "image", 14]]


def refused(family, batch, message, **options):
    with attach(model_of(family), CONFIG), pytest.raises(InputError, match=message):
        model_of(family)(**batch, **options)


# -------------------------------------------------------------------------------------- chunks and packs


@since_5_18
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3", "internvl"])
def test_a_prompt_in_chunks(family):
    model = model_of(family)
    options = {"max_new_tokens": 2, "do_sample": False, "prefill_chunk_size": 8}
    with attach(model, CONFIG):
        with pytest.raises(InputError, match=r"generate\(prefill_chunk_size=8\) cuts a prompt.*Leave"):
            model.generate(**tiny_batch(model, ROW), **options)
        with pytest.raises(InputError, match=r"generate\(prefill_chunk_size=…\).*Leave"):
            type(model).generate(model, **tiny_batch(model, ROW), **options)
        assert model.generate(**tiny_batch(model, [[20]]), **options).shape == (1, 22)


def packed(family):
    """Return two documents in one row, as a collator without padding packs them."""
    model = model_of(family)
    documents = [tiny_batch(model, [row], row_numbers=[n]) for n, row in enumerate([ROW[0], [4, "image", 5]])]
    lengths = [document["input_ids"].shape[1] for document in documents]
    call = {name: torch.cat([one[name] for one in documents], dim=1) for name in ("input_ids",)}
    others = documents[0].keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}
    call |= {name: torch.cat([one[name] for one in documents]) for name in others}
    return call, torch.cat([torch.arange(length) for length in lengths])[None]


def test_packed_documents():
    call, positions = packed("llava")
    message = r"packed documents \(position_ids begin again within a row\).*a row of its own"
    refused("llava", call, message, position_ids=positions, use_cache=False)
    call, positions = packed("qwen2_5_vl")
    refused("qwen2_5_vl", call, message, position_ids=positions.expand(3, 1, -1), use_cache=False)


def test_packed_documents_by_their_lengths():
    call, _ = packed("llava")
    refused("llava", call, r"cu_seq_lens_q=\[0, 33", cu_seq_lens_q=torch.tensor([0, 33, 58]))


def test_positions_that_fall_within_an_image_are_not_packing():
    model = model_of("qwen2_5_vl")
    batch = tiny_batch(model, ROW)
    positions, _ = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
    )
    assert (positions.diff(dim=-1) < 0).any()
    del batch["attention_mask"]
    with torch.no_grad(), attach(model, CONFIG) as skip:
        model(**batch, position_ids=positions)
        assert skip.plan.images == 1


# ------------------------------------------------------------------------------------- caches and models


@pytest.mark.parametrize("cache", ["static", "offloaded_static"])
@pytest.mark.parametrize(
    "family", [pytest.param("gemma3", marks=since_5_18), "llava", "mistral3", "qwen2_5_vl"]
)
def test_caches_of_fixed_size_are_named(family, cache):
    """Some families get other masks with such a cache; it is the cache that the caller can change."""
    model = model_of(family)
    options = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": cache}
    with attach(model, CONFIG):
        with pytest.raises(UnsupportedModelError, match=rf"implementation='{cache}' .* static cache"):
            model.generate(**tiny_batch(model, ROW), **options)
        with pytest.raises(UnsupportedModelError, match=r"layer 0 is a Static\w*Layer, .* static cache"):
            type(model).generate(model, **tiny_batch(model, ROW), **options)
        model.generate(**tiny_batch(model, ROW), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", sorted({"lfm2_vl", "qwen3_5"} - {*LEFT_OUT}))
def test_such_caches_of_decoders_with_states(family):
    model = model_of(family)
    batch, decoder = tiny_batch(model, ROW), model.config.get_text_config()
    with attach(model, CONFIG):
        for name in ("static", "quantized", "offloaded"):
            with pytest.raises(
                UnsupportedModelError, match=f"cache_implementation='{name}' makes a KV cache"
            ):
                model.generate(**batch, max_new_tokens=2, cache_implementation=name)
        cache = StaticCache(config=decoder, max_cache_len=64)
        with pytest.raises(UnsupportedModelError, match=r"is a Static\w*Layer, .* static cache"):
            model.generate(**batch, max_new_tokens=2, past_key_values=cache)
        cache = DynamicCache(config=decoder, offloading=True)
        with pytest.raises(UnsupportedModelError, match="KV cache is offloaded"):
            model.generate(**batch, max_new_tokens=2, past_key_values=cache)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("blip-2", "its own generate runs the text model alone"),
        ("chameleon", "it has no separate text model"),
        ("inkling_mm_model", "attention counts distances between entries of the cache"),
    ],
)
def test_families_that_are_known_not_to_work_are_refused_by_attach(family, reason):
    with pytest.raises(UnsupportedModelError, match=f"is not supported: {reason}") as caught:
        attach(tiny_model(family), CONFIG)
    assert caught.value.reason.startswith(reason)


@pytest.mark.skipif("glm5_next" in LEFT_OUT, reason="the family does not exist")
def test_answers_cannot_be_hidden_from_attention_that_makes_its_masks_itself():
    model = model_of("glm5_next")
    batch = tiny_batch(model, ROW)
    decoded = torch.zeros_like(batch["input_ids"])
    decoded[:, -4:] = 1
    message = r"makes its masks itself.*train with skip_kv=False, or with skipped=0"
    with attach(model, CONFIG) as skip:
        with pytest.raises(ConfigError, match=message):
            skip.check_training()
        with pytest.raises(ConfigError, match=message):
            model(**batch, use_cache=False, skip_vision_decoded=decoded)
    for change in ({"skip_kv": False}, {"skipped": 0, "merge": "drop"}):
        with attach(model, CONFIG.model_copy(update=change)) as skip:
            skip.check_training()
            model(**batch, use_cache=False, skip_vision_decoded=decoded)
            assert not skip.plan.is_identity


# ---------------------------------------------------------------------------------- mixtures of experts


@pytest.mark.parametrize(
    "family", sorted({"qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "qwen3_omni_moe_thinker"} - {*LEFT_OUT})
)
def test_the_load_balancing_loss(family):
    model = tiny_model(family)
    batch = tiny_batch(model, [*ROW, [5]], padding="right")
    labels = labels_of(model, batch)
    message = r"output_router_logits=True with an attention_mask of shape \(2, .*Leave out the mask"
    with attach(model, CONFIG), pytest.raises(InputError, match=message):
        model(**batch, labels=labels, output_router_logits=True)
    alone = tiny_batch(model, ROW)
    labels = labels_of(model, alone)
    del alone["attention_mask"]
    with attach(model, CONFIG) as skip:
        out = model(**alone, labels=labels, output_router_logits=True)
        assert out.aux_loss.isfinite()
        assert out.router_logits[-1].shape[0] == skip.plan.ffn_mask.sum(), "those that take the FFN"
        text = tiny_batch(model, [[6], [4]])
        assert model(**text, labels=text["input_ids"], output_router_logits=True).loss.isfinite()


def test_attention_weights_are_of_the_reduced_sequence():
    model = model_of("llava", "eager")
    with torch.no_grad(), attach(model, CONFIG) as skip:
        weights = model(**tiny_batch(model, ROW), output_attentions=True).attentions
    length = skip.plan.source.shape[1]
    assert [layer.shape[2:] for layer in weights] == [(length, length)] * 3


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava", "llama4", "qwen2_5_vl"])
def test_images_without_placeholders(family):
    model = model_of(family)
    batch = tiny_batch(model, ROW)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 40)
    refused(family, batch, r"images came with input_ids .* that hold no placeholder")


@pytest.mark.parametrize("family", ["glm4v", "qwen2_5_vl", "qwen3_vl"])
def test_no_grid(family):
    batch = tiny_batch(model_of(family), ROW)
    del batch["image_grid_thw"]
    message = "get_image_features needs image_grid_thw besides pixel_values: pass"
    refused(family, batch, message)
    refused(family, batch, message, image_grid_thw=None)


@pytest.mark.parametrize("family", ["glm4v", "qwen2_5_vl", "qwen3_vl"])
def test_more_pixels_than_the_grid_has(family):
    batch = tiny_batch(model_of(family), ROW)
    batch["pixel_values"] = batch["pixel_values"].repeat(2, 1)
    refused(family, batch, r"got 128 patches of pixels, but grids \[\[1, 8, 8\]\] for 64")


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
def test_a_mask_that_is_too_short(family):
    batch = tiny_batch(model_of(family), ROW)
    batch["attention_mask"] = batch["attention_mask"][:, 1:]
    length = batch["input_ids"].shape[1]
    refused(family, batch, rf"attention_mask \(1, {length - 1}\) cannot be reduced: .*\(1, {length}\)")


def test_embeddings_after_a_pruned_cache():
    model = model_of("llava")
    embed = model.get_input_embeddings()
    with torch.no_grad(), attach(model, CONFIG):
        cache = model(**tiny_batch(model, ROW), use_cache=True).past_key_values
        with pytest.raises(InputError, match=r"inputs_embeds without input_ids, of shape \(1, 2, \d+\)"):
            model(inputs_embeds=embed(torch.tensor([[40, 41]])), past_key_values=cache)
        model(inputs_embeds=embed(torch.tensor([[40]])), past_key_values=cache)


def test_videos():
    model = model_of("qwen2_5_vl")
    batch, config = tiny_batch(model, ROW), model.config
    ids = batch["input_ids"]
    video = {
        "input_ids": ids.masked_fill(ids == config.image_token_id, config.video_token_id),
        "attention_mask": batch["attention_mask"],
        "mm_token_type_ids": 2 * batch["mm_token_type_ids"],
        "pixel_values_videos": batch["pixel_values"],
        "video_grid_thw": batch["image_grid_thw"],
    }
    with torch.no_grad():
        plain = model(**video).logits
        with attach(model, CONFIG), pytest.warns(UserWarning, match="videos are not reduced"):
            assert torch.equal(model(**video).logits, plain)


# ----------------------------------------------------------------------------------- rows of a pruned cache


def after(model, cache, rows):
    return model(input_ids=torch.full((rows, 1), 40), past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [name for name in ("dots3_note", "gemma3", "llava", "qwen2_5_vl") if name not in LEFT_OUT]
)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_a_pruned_cache_whose_rows_move(family, positions):
    model = model_of(family)
    batch = tiny_batch(model, [[3, "image", 4], [5]])
    with attach(model, CONFIG.model_copy(update={"positions": positions})):
        cache = model(**batch, use_cache=True).past_key_values
        expected = after(model, copy.deepcopy(cache), 2)
        for move in (
            lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
            lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        ):
            moved = pickle.loads(pickle.dumps(cache))
            move(moved)
            torch.testing.assert_close(after(model, moved, 2), expected.flip(0), rtol=1e-4, atol=1e-4)
        cache.batch_repeat_interleave(2)
        repeated = expected.repeat_interleave(2, dim=0)
        torch.testing.assert_close(after(model, cache, 4), repeated, rtol=1e-4, atol=1e-4)
