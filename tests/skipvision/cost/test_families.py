"""Predicted costs of every supported family match what its tiny model executes and caches."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from skipvision import SkipConfig, attach, measure_flops, predict_cost
from skipvision.anatomy.cache_layers import cached_values
from skipvision.anatomy.families import dissect, lm_head
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.families.running import new_cache
from tests.skipvision.family_table import SUPPORTED

SAMPLE = {"gemma3", "idefics3", "kimi_k25", "lfm2_vl", "llama4", "qwen2_vl", "qwen3_5", "qwen3_vl_moe"}
PAIRED = {"hunyuan_vl", "llava_onevision"}
"""Families that are sampled with two images."""
CONFIGS = {
    "full": SkipConfig.full(),
    "reduced": SkipConfig(retained=0.25, skipped=0.5, summary_tokens=2),
    "probed": SkipConfig(retained=0.25, skipped=0.5, summary_tokens=0, select="ffn_ratio", probe_layer=1),
}
WORDS, ANSWER = 20, 12

families = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in SUPPORTED]
)
configs = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def model_of(family):
    return tiny_model(family)


def predicted(model, config, inputs, **options):
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - visual - options.pop("answer", 0)
    each = visual // options.get("images", 1)
    return predict_cost(model.config, config, visual_tokens=each, text_tokens=text, **options)


def last(model, positions):
    """Ask for the LM head at the last positions only, if the family supports it."""
    return (
        {"logits_to_keep": positions}
        if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )


def kept_bytes(cache):
    states = [tensor for layer in cache.layers for tensor in cached_values(layer).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in states)


@families
@configs
def test_prefill_and_cache(family, name):
    model, config = model_of(family), CONFIGS[name]
    inputs, seen = tiny_batch(model, [["image", WORDS]]), []
    cost = predicted(model, config, inputs)
    given = {**inputs, **last(model, 1), "use_cache": True, "past_key_values": new_cache(model)}
    with torch.no_grad(), attach(model, config) as skip:
        flops = measure_flops(lambda: seen.append(model(**given)))
    assert cost.prefill_flops == pytest.approx(flops, rel=0.03)
    assert cost.kv_bytes == kept_bytes(seen[0].past_key_values)
    assert cost.sequence == skip.plan.roles.shape[1]


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in PAIRED else pytest.mark.slow) for name in SUPPORTED],
)
def test_two_images(family):
    """Some towers see all images of a row as one sequence, and pay for it."""
    model, config = model_of(family), CONFIGS["reduced"]
    inputs = tiny_batch(model, [["image", WORDS, "image", 2]])
    cost = predicted(model, config, inputs, images=2)
    with torch.no_grad(), attach(model, config) as skip:
        flops = measure_flops(lambda: model(**inputs, **last(model, 1)))
    assert cost.prefill_flops == pytest.approx(flops, rel=0.03)
    assert cost.sequence == skip.plan.roles.shape[1]


@families
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("reduced", 4),
        ("probed", 4),
        pytest.param("full", 4, marks=pytest.mark.slow),
        pytest.param("reduced", 0, marks=pytest.mark.slow),
        pytest.param("full", 0, marks=pytest.mark.slow),
        pytest.param("probed", 0, marks=pytest.mark.slow),
    ],
)
def test_training_step(family, name, rank):
    model, config = tiny_model(family), CONFIGS[name]
    inputs = tiny_batch(model, [["image", WORDS + ANSWER]])
    cost = predicted(model, config, inputs, answer=ANSWER, new_tokens=ANSWER, lora_rank=rank)
    # Only the decoder trains: by LoRA on each of its linear layers, or as a whole.
    decoder = dissect(model).decoder
    model.requires_grad_(False)
    if rank:
        parts = set(decoder.layers.modules())
        for path, part in list(model.named_modules()):
            # One pattern: given a list, PEFT also adapts the experts of some mixtures.
            if type(part) is nn.Linear and part in parts:
                model.set_submodule(path, lora.Linear(part, "default", LoraConfig(), r=rank))
    else:
        decoder.requires_grad_(True)
        lm_head(model).requires_grad_(True)

    def step():
        model(**inputs, **last(model, ANSWER), use_cache=False).logits.logsumexp(dim=-1).sum().backward()

    with attach(model.train(), config):
        flops = measure_flops(step)
    assert cost.train_flops == pytest.approx(flops, rel=0.03)
