"""The bound holds for any weights, its parts are nearly tight, and it is exact where that is possible."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, Starcoder2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import skipvision as sv
from skipvision.analysis import error_bound
from skipvision.analysis.lipschitz import AttentionBound, Normed, ffn_constant
from skipvision.anatomy.families import dissect
from skipvision.testing.configs import tiny_config
from skipvision.testing.families import tiny_batch, tiny_model

CONFIG = sv.SkipConfig(retained=0.25)
FAMILIES = ["llava", "vipllava", "qwen2_vl", "internvl", "idefics3"]


def prompt(model, seed=0):
    return tiny_batch(model, [[3, "image", 5]], seed=seed)


def check_bound(found):
    for errors in (*found.layers, found.output):
        assert errors.measured <= errors.local * (1 + 1e-3), found
        assert errors.measured <= errors.worst * (1 + 1e-9), found
    assert found.output.measured <= found.output.composite * (1 + 1e-3), found
    assert found.output.measured <= found.output.summed * (1 + 1e-9), found
    assert found.output.summed <= found.output.composite * (1 + 1e-3), found


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.2, 0.7, 1.0, 1.6]),
    retained=st.sampled_from([0, 1, 0.3, 0.8]),
    select=st.sampled_from(["similarity", "norm", "random"]),
)
def test_the_bound_holds(family, seed, scale, retained, select):
    model = tiny_model(family, seed=seed, dtype=torch.float64)
    for parameter in dissect(model).decoder.parameters():
        if parameter.ndim > 1:
            parameter.data *= scale
    check_bound(error_bound(model, prompt(model, seed), sv.SkipConfig(retained=retained, select=select)))


def test_layers_with_layer_norm_and_without_a_gate():
    config = tiny_config("llava")
    config.text_config = Starcoder2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=config.text_config.vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    check_bound(error_bound(model, prompt(tiny_model("llava", dtype=torch.float64)), CONFIG))


def test_the_scaling_of_rotary_embeddings_counts():
    constants = []
    for stretch in (1.0, 10.0):
        model = tiny_model("llava", dtype=torch.float64)
        dissect(model).decoder.rotary_emb.attention_scaling = stretch  # as YaRN's
        found = error_bound(model, prompt(model), CONFIG)
        check_bound(found)
        constants.append(found.layers[-1].attention)
    assert constants[1] > 10 * constants[0]


def test_the_bound_is_exact_after_the_first_layer():
    model = tiny_model("llava", dtype=torch.float64)
    found = error_bound(model, prompt(model), CONFIG)
    first = found.layers[0]
    assert first.measured == pytest.approx(first.omitted)
    assert first.local == pytest.approx(first.measured)
    assert first.worst == pytest.approx(first.measured)
    assert (found.tokens, found.skipped) == (24, 12)


def test_nothing_skipped_makes_no_error():
    model = tiny_model("llava", dtype=torch.float64)
    found = error_bound(model, prompt(model), sv.SkipConfig(retained=1.0))
    assert found.output.composite == found.output.summed == pytest.approx(0, abs=1e-12)
    for errors in (*found.layers, found.output):
        assert (errors.measured, errors.local, errors.worst) == pytest.approx((0, 0, 0), abs=1e-12)


def test_lora_counts_as_merged():
    model = get_peft_model(
        tiny_model("llava", dtype=torch.float64),
        LoraConfig(target_modules=r".*language_model.*(q|v|down)_proj", init_lora_weights=False),
    ).eval()
    batch = prompt(model)
    unmerged = error_bound(model, batch, CONFIG)
    merged = error_bound(model.merge_and_unload(), batch, CONFIG)
    for one, other in zip(unmerged.layers, merged.layers, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-6)


def test_the_model_is_unchanged():
    model = tiny_model("llava")
    batch = prompt(model)
    before = model(**batch).logits
    error_bound(model, batch, CONFIG)
    assert sv.attachment_of(model) is None
    assert torch.equal(model(**batch).logits, before)
    config = sv.SkipConfig(retained=2, skipped=2)
    with sv.attach(model, config) as skip:
        alone = error_bound(model, batch, CONFIG)
        assert skip.config == config
    assert alone == error_bound(model, batch, CONFIG)


def test_layers_of_an_unknown_kind_have_the_local_bound_only():
    model = tiny_model("gemma3", dtype=torch.float64)
    with pytest.raises(sv.UnsupportedModelError, match="pre_feedforward_layernorm"):
        error_bound(model, prompt(model), CONFIG)
    found = error_bound(model, prompt(model), CONFIG, worst_case=False)
    for errors in (*found.layers, found.output):
        assert errors.measured <= errors.local * (1 + 1e-3)
        assert errors.worst is None


def test_unsuitable_inputs_and_models_are_rejected():
    model = tiny_model("llava")
    with pytest.raises(sv.InputError, match="one row"):
        error_bound(model, tiny_batch(model, [[3, "image"], [3, "image"]]), CONFIG)
    with pytest.raises(sv.InputError, match="no image"):
        error_bound(model, tiny_batch(model, [[3]]), CONFIG)
    with pytest.raises(sv.InputError, match=r"model\.eval"):
        error_bound(model.train(), prompt(model), CONFIG)
    model = tiny_model("qwen3_vl")
    with pytest.raises(sv.UnsupportedModelError, match="between layers 0 and 1"):
        error_bound(model, prompt(model), CONFIG, worst_case=False)


# ------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("norm", [LlamaRMSNorm(6, eps=0.05), nn.LayerNorm(6, eps=0.05)])
def test_no_error_after_a_norm_exceeds_its_bound(norm):
    norm = norm.double()
    torch.manual_seed(0)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    closest = 0.0
    for size, step in product([0.01, 0.3, 3.0, 100.0], [0.03, 0.1, 1.0, 10.0]):
        one = size * torch.randn(1, 500, 6, dtype=torch.double)
        other = one + size * step * torch.randn(1, 500, 6, dtype=torch.double)
        bound = Normed(norm, one, other)
        with torch.no_grad():
            moved = ((norm(one) - norm(other)) / bound.scale)[0].norm(dim=-1)
        ratio = moved / bound.bound((one - other)[0].norm(dim=-1))
        closest = max(closest, float(ratio.max()))
        assert bool((ratio <= 1 + 1e-4).all())  # RMSNorm computes in float32
    assert closest > 0.95


def test_a_norm_of_another_kind_is_rejected():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

        def forward(self, hidden):
            return 2 * hidden

    one = torch.randn(1, 5, 6)
    with pytest.raises(sv.UnsupportedModelError, match="Doubled is neither RMSNorm nor LayerNorm"):
        Normed(Doubled(), one, one)


def linear(weight):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.double)
    module.weight.data = weight
    return module


def runs_of(modules, inputs):
    """Stand-ins for two `Run`s of the modules on these (T, H) inputs."""
    with torch.no_grad():
        return [
            SimpleNamespace(seen={module: module(x[None]) for module in modules}, output=x[None])
            for x in inputs
        ]


UNSCALED = SimpleNamespace(scale=torch.ones(1, dtype=torch.double))


def test_no_error_of_attention_exceeds_its_bound_and_some_reach_half_of_it():
    generator = torch.Generator().manual_seed(0)
    closest = 0.0
    for trial in range(300):
        weights = [torch.randn(2, 2, generator=generator, dtype=torch.double) for _ in range(4)]
        weights[trial % 3] *= 10
        query, key, value, out = (linear(weight) for weight in weights)
        one = torch.randn(3, 2, generator=generator, dtype=torch.double)
        step = 10 ** (-3 * float(torch.rand(1, generator=generator)))
        # In every other trial only the last token moves, so the others change by its key and value alone.
        moving = torch.tensor([[trial % 2], [trial % 2], [1]])
        other = one + step * moving * torch.randn(3, 2, generator=generator, dtype=torch.double)
        runs = runs_of([query, key, value], [one, other])
        attention = SimpleNamespace(head_dim=2, scaling=0.7)
        parts = SimpleNamespace(halves=(attention, None), projections=(query, key, value, out))
        stretch = 1.0 + trial % 2 / 2
        bound = AttentionBound(parts, UNSCALED, runs, stretch)
        with torch.no_grad():
            outputs = [
                out((0.7 * stretch**2 * query(x) @ key(x).mT).softmax(dim=-1) @ value(x))
                for x in (one, other)
            ]
        moved = (outputs[0] - outputs[1]).norm(dim=-1)
        limit = bound.bound((one - other).norm(dim=-1))
        assert bool((moved <= limit).all())
        assert float(limit.max()) <= bound.constant() * float((one - other).norm(dim=-1).max()) * (1 + 1e-9)
        closest = max(closest, float((moved / limit).max()))
    assert closest > 0.4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.ReLU()])
def test_no_error_of_the_ffn_exceeds_its_bound_and_some_nearly_reach_it(gated, activation):
    generator = torch.Generator().manual_seed(0)
    closest = 0.0
    for _ in range(30):
        shapes = [(1, 1)] * (3 if gated else 2)
        modules = [linear(torch.randn(shape, generator=generator, dtype=torch.double)) for shape in shapes]
        one = 3 * torch.randn(400, 1, generator=generator, dtype=torch.double)
        other = one + 0.01 * torch.randn(400, 1, generator=generator, dtype=torch.double)
        *entries, down = modules
        parts = SimpleNamespace(linear=tuple(modules), activation=activation)
        constant = ffn_constant(parts, UNSCALED, runs_of(entries, [one, other]))
        with torch.no_grad():
            inner = [activation(entries[0](x)) * (entries[1](x) if gated else 1) for x in (one, other)]
            moved = (down(inner[0]) - down(inner[1])).norm(dim=-1)
        ratio = moved / (one - other).norm(dim=-1)
        assert float(ratio.max()) <= constant * (1 + 1e-9)
        closest = max(closest, float(ratio.max()) / constant)
    assert closest > 0.9
