"""The mask of generated tokens: in training, answers see only the tokens that decoding will have."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import skipvision as sv
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"layout": "raster"},
        {"layout": "grouped"},
        {"select": "attention", "merge": "drop"},
        {"select": "relevance"},
        {"drop_after": 0},
        {"size_bias": True},
        {"drop_after": 1, "skip_layers": [1]},
    ],
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_call_gives_the_logits_of_decoding_step_by_step(attention, chosen, padding):
    model = tiny_llava(dtype=torch.float64, attention=attention)
    rows = [[3, "image", 6], [2, "image", 3, "image", 5], [7]]
    whole = tiny_inputs(rows, dtype=torch.float64, padding=padding)
    answer = 3
    config = sv.SkipConfig(retained=4, skipped=5, summary_tokens=1, **chosen)
    lengths = whole["attention_mask"].sum(dim=1)
    decoded = torch.zeros_like(whole["input_ids"], dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        end = decoded.shape[1] if padding == "left" else length
        decoded[row, end - answer : end] = True
    with sv.attach(model, config), torch.no_grad():
        trained = model(**whole, skip_vision_decoded=decoded, use_cache=False).logits
        plain = model(**whole, use_cache=False).logits
        for row in range(len(rows)):
            real = whole["attention_mask"][row].bool()
            ids = whole["input_ids"][row, real][None]
            images = [part for part in rows[row] if part == "image"]
            first = sum(part == "image" for earlier in rows[:row] for part in earlier)
            pixels = {"pixel_values": whole["pixel_values"][first : first + len(images)]} if images else {}
            out = model(ids[:, :-answer], **pixels, use_cache=True)
            steps = [out.logits[:, -1]]
            for position in range(ids.shape[1] - answer, ids.shape[1]):
                out = model(ids[:, position : position + 1], past_key_values=out.past_key_values)
                steps.append(out.logits[:, -1])
            expected = torch.cat(steps)
            torch.testing.assert_close(trained[row, real][-answer - 1 :], expected, atol=1e-5, rtol=1e-5)
            if images:
                assert not torch.allclose(plain[row, real][-answer:], expected[-answer:])


def test_the_mask_is_for_training_calls_only():
    model = tiny_llava()
    inputs = tiny_inputs([[3, "image", 4]])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    with sv.attach(model, sv.SkipConfig(retained=4, skipped=5)):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.reset()
        with pytest.raises(sv.InputError, match="use_cache=False"):
            model(**inputs, skip_vision_decoded=mask, past_key_values=cache)
    # Without skip_kv nothing is forgotten, so the mask changes nothing.
    with sv.attach(model, sv.SkipConfig(retained=4, skipped=5, skip_kv=False)):
        mask[:, -2:] = True
        assert torch.equal(
            model(**inputs, skip_vision_decoded=mask, use_cache=False).logits,
            model(**inputs, use_cache=False).logits,
        )


def test_an_invalid_mask_is_refused():
    model = tiny_llava()
    inputs = tiny_inputs([[3, "image", 4], [5, "image", 2]])
    shape = tuple(inputs["input_ids"].shape)
    good = torch.zeros(shape, dtype=torch.bool)
    good[:, -2:] = True
    wrong = [
        good[:, 1:],
        good[:1],
        good[None],
        good[:, None, :],
        good.float(),
        good.long() * 2,
        -good.long(),
        [1],
    ]
    with sv.attach(model, sv.SkipConfig(retained=4, skipped=5)):
        expected = model(**inputs, skip_vision_decoded=good, use_cache=False).logits
        for dtype in (torch.int64, torch.int32, torch.uint8):
            same = model(**inputs, skip_vision_decoded=good.to(dtype), use_cache=False).logits
            assert torch.equal(same, expected)
        for mask in wrong:
            with pytest.raises(sv.InputError, match=re.escape(f"bool tensor of shape {shape}")):
                model(**inputs, skip_vision_decoded=mask, use_cache=False)
        with pytest.raises(sv.InputError, match=re.escape(f"is of shape {(shape[0], shape[1] - 1)}")):
            model(**inputs, skip_vision_decoded=wrong[0], use_cache=False)


@pytest.mark.filterwarnings("default:answers are trained on skipped tokens:UserWarning")
def test_training_without_the_mask_warns_once():
    model = tiny_llava()
    inputs = tiny_inputs([[3, "image", 4]])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    config = sv.SkipConfig(retained=4, skipped=5)
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, -4:] = True
    with sv.attach(model, config), warnings.catch_warnings(record=True) as told:
        with torch.no_grad():
            model(**inputs, labels=labels, use_cache=False)
        model(**inputs, use_cache=False)
        model(**inputs, labels=labels, use_cache=False, skip_vision_decoded=mask)
        assert not told
        model(**inputs, labels=labels, use_cache=False)
        model(**inputs, labels=labels, use_cache=False)
    assert [str(one.message)[:33] for one in told] == ["answers are trained on skipped to"]
    for harmless in (config.model_copy(update={"skip_kv": False}), sv.SkipConfig.full()):
        with sv.attach(model, harmless), warnings.catch_warnings(record=True) as told:
            model(**inputs, labels=labels, use_cache=False)
        assert not told
