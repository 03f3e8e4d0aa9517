"""If nothing is skipped, the model computes what the untouched one does, bit for bit."""

import gc
import weakref

import pytest
import torch

from skipvision import SkipConfig, attach, attachment_of
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS, labels_for

SKIPS_NOTHING = {
    "full": SkipConfig.full(),
    "all-retained": SkipConfig(retained=16, skipped=0, summary_tokens=0),
    "more-than-there-are": SkipConfig(
        retained=999, skipped=999, summary_tokens=0, layout="grouped", positions="contiguous", merge="drop"
    ),
    "probed": SkipConfig(retained=1.0, skipped=0.0, summary_tokens=0, select="ffn_ratio"),
}
GENERATE = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture
def model():
    return tiny_llava()


@pytest.fixture(params=["left", "right"])
def inputs(request):
    return tiny_inputs(ROWS, padding=request.param)


def everything(model, inputs):
    """Return every output of a model as one dictionary of tensors."""
    model.zero_grad()
    out = model(**inputs, labels=labels_for(inputs), use_cache=True, output_hidden_states=True)
    out.loss.backward()
    seen = {"loss": out.loss, "logits": out.logits}
    for number, hidden in enumerate(out.hidden_states):
        seen[f"hidden {number}"] = hidden
    for number, layer in enumerate(out.past_key_values.layers):
        seen[f"keys {number}"], seen[f"values {number}"] = layer.keys, layer.values
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen[f"gradient of {name}"] = parameter.grad
    return {name: value.detach().clone() for name, value in seen.items()}


def generated(model, how):
    torch.manual_seed(5)
    inputs = tiny_inputs(ROWS, padding="left")
    return {"ids": model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, **GENERATE[how])}


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def traces(model):
    """Return everything that attaching could leave on the modules."""
    return {
        name: (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks_with_kwargs),
            list(module._forward_pre_hooks_with_kwargs),
            sorted(vars(module)),
            list(module._modules),
            list(module._parameters),
            list(module._buffers),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", SKIPS_NOTHING)
def test_nothing_skipped_is_the_untouched_model(model, inputs, name):
    expected = everything(model, inputs)
    with attach(model, SKIPS_NOTHING[name]) as skip:
        assert_identical(everything(model, inputs), expected)
        assert skip.plan is not None
        assert skip.plan.is_identity
    assert_identical(everything(model, inputs), expected)


@pytest.mark.parametrize("how", GENERATE)
def test_nothing_skipped_generates_the_same(model, how):
    expected = generated(model, how)
    with attach(model, SkipConfig.full()):
        assert_identical(generated(model, how), expected)


@pytest.mark.parametrize("name", ["counts", "grouped-contiguous", "ffn-ratio"])
def test_detaching_restores_the_model(model, inputs, name):
    expected, before, names = everything(model, inputs), traces(model), list(model.state_dict())
    skip = attach(model, CONFIGS[name])
    changed = everything(model, inputs)
    assert not torch.equal(changed["logits"], expected["logits"])
    skip.detach()
    skip.detach()  # A second time is harmless.
    model.zero_grad()
    assert_identical(everything(model, inputs), expected)
    assert traces(model) == before
    assert list(model.state_dict()) == names
    assert attachment_of(model) is None


def test_detaching_restores_generation(model):
    expected = generated(model, "greedy")
    with attach(model, CONFIGS["counts"]):
        generated(model, "greedy")
    assert_identical(generated(model, "greedy"), expected)


def test_a_body_that_raises_leaves_nothing_behind(model, inputs):
    expected, before = everything(model, inputs), traces(model)

    def body():
        with attach(model, CONFIGS["counts"]):
            model(**inputs)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        body()
    assert traces(model) == before
    assert_identical(everything(model, inputs), expected)


def test_a_forward_that_raises_leaves_nothing_behind(model, inputs):
    expected = everything(model, inputs)

    def fail(*args):
        raise RuntimeError("in the middle of a layer")

    config = CONFIGS["ffn-ratio"]
    with attach(model, config):
        for part in ("self_attn", "mlp"):
            handle = model.model.language_model.layers[1].get_submodule(part).register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                model(**inputs)
            handle.remove()
    assert_identical(everything(model, inputs), expected)


def test_a_batch_without_images_is_untouched(model):
    inputs = tiny_inputs([[5], [8]])
    expected = everything(model, inputs)
    with attach(model, CONFIGS["counts"]) as skip:
        seen = everything(model, inputs)
        # The summary layer takes part with zeros: every process of a distributed step has its gradient.
        idle = [seen.pop(name) for name in list(seen) if "skip_summary" in name]
        assert len(idle) == 3
        assert not any(gradient.any() for gradient in idle)
        assert_identical(seen, expected)
        assert skip.plan is None


def test_other_models_are_unaffected(inputs):
    first, second, third = tiny_llava(), tiny_llava(seed=1), tiny_llava(seed=2)
    expected = everything(second, inputs)
    with attach(third, CONFIGS["pool"]):
        alone = everything(third, inputs)
    with attach(first, CONFIGS["counts"]), attach(third, CONFIGS["pool"]):
        everything(first, inputs)
        assert_identical(everything(second, inputs), expected)
        third.zero_grad()
        assert_identical(everything(third, inputs), alone)


def test_a_detached_attachment_keeps_no_model_alive():
    model = tiny_llava()
    with attach(model, CONFIGS["counts"]):
        model(**tiny_inputs(ROWS))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_attachment_of_finds_the_attachment(model):
    assert attachment_of(model) is None
    skip = attach(model, CONFIGS["counts"])
    assert attachment_of(model) is skip
    assert "SkipConfig(retained=5" in repr(skip)
    skip.detach()
    with attach(model, CONFIGS["pool"]) as again:
        assert attachment_of(model) is again
