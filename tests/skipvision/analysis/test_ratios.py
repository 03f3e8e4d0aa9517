"""FFN ratios are the size of the FFN's output relative to its input, for visual and for text tokens."""

from __future__ import annotations

import pytest
import torch

import skipvision as sv
from skipvision.analysis import ffn_ratios
from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch, tiny_model

ROWS = [[4, "image", 3], [2, "image", 1, "image"], [6]]


def expected(model, batch):
    """(layers, B, T) in a decoder whose layers are h + attention, and then the FFN of the normed sum."""
    found = []

    def measure(layer, args, output):
        # The input of post_attention_layernorm is h; the FFN adds the rest.
        found.append((output - middle[0]).norm(dim=-1) / middle[0].norm(dim=-1))
        middle.clear()

    middle: list[torch.Tensor] = []
    handles = []
    for layer in (one.whole for one in dissect(model).layers):
        norm = layer.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda norm, args: middle.append(args[0])))
        handles.append(layer.register_forward_hook(measure))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("attached", [False, True])
def test_the_ratios_of_a_plain_decoder(attached):
    model = tiny_model("llava")
    batch = tiny_batch(model, ROWS)
    ratios = expected(model, batch)
    visual = batch["input_ids"] == model.config.image_token_id
    text = batch["attention_mask"].bool() & ~visual
    if attached:
        sv.attach(model, sv.SkipConfig(retained=2, skipped=2))
    found = ffn_ratios(model, [batch])
    for spread, mask in ((found.visual, visual), (found.text, text)):
        assert spread.tokens == int(mask.sum())
        assert torch.allclose(torch.tensor(spread.mean), ratios[:, mask].mean(dim=1), rtol=1e-4)
        middle = ratios[:, mask].quantile(0.5, dim=1, interpolation="nearest")
        assert torch.allclose(torch.tensor([each[2] for each in spread.quantiles]), middle, rtol=1e-4)
        for layer, histogram in enumerate(spread.histogram):
            counts = torch.tensor(found.edges)
            below = [(ratios[layer, mask] <= edge).float().mean() for edge in counts[1:]]
            assert torch.allclose(torch.tensor(histogram).cumsum(0), torch.stack(below), atol=0.02)


def test_batches_are_one_sample():
    model = tiny_model("llava")
    one, other = tiny_batch(model, ROWS[:1], seed=1), tiny_batch(model, ROWS[1:], seed=2)
    separate = [ffn_ratios(model, [batch]) for batch in (one, other)]
    together = ffn_ratios(model, [one, other])
    tokens = [found.visual.tokens for found in separate]
    for layer, mean in enumerate(together.visual.mean):
        weighted = sum(n * found.visual.mean[layer] for n, found in zip(tokens, separate, strict=True))
        assert mean == pytest.approx(weighted / sum(tokens), rel=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_vl"])
def test_families_with_other_layer_structures(family):
    model = tiny_model(family)
    found = ffn_ratios(model, [tiny_batch(model, [[4, "image", 3]])])
    assert len(found.visual.mean) == 3
    assert all(0 < mean < 10 for mean in found.visual.mean + found.text.mean)


def test_an_ffn_that_does_nothing():
    model = tiny_model("llava")
    for mlp in (layer.mlp for layer in dissect(model).layers):
        torch.nn.init.zeros_(mlp.down_proj.weight)
    found = ffn_ratios(model, [tiny_batch(model, ROWS)])
    assert found.visual.mean == found.text.mean == [0.0] * 3


def test_data_without_images_are_rejected():
    model = tiny_model("llava")
    with pytest.raises(sv.InputError, match="lack visual tokens or text tokens"):
        ffn_ratios(model, [tiny_batch(model, [[6]])])
    with pytest.raises(sv.InputError, match="0 batches"):
        ffn_ratios(model, [])
