"""Gradients equal those of the naive reference, with and without checkpointing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from skipvision import attach
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import CONFIGS, ROWS, checkpoint_activations, close, labels_for, train_summary

F64 = torch.float64
LORA = LoraConfig(
    r=2,
    lora_alpha=4,
    target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    init_lora_weights=False,
)


@pytest.fixture
def inputs():
    return tiny_inputs(ROWS, padding="right", dtype=F64)


def lora_model():
    torch.manual_seed(0)
    return get_peft_model(tiny_llava(dtype=F64), LORA)


def gradients(model):
    """Return the gradient of every trainable parameter by name, and clear it."""
    taken = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return taken


def learns(name, gradient):
    """Return whether a gradient exceeds rounding. A shift of all scores changes no softmax."""
    return float(gradient.abs().max()) > 1e-9 or name.endswith("norm.bias")


def loss_by_hand(logits, labels):
    """Return the mean cross-entropy of each labelled token under the logits before it."""
    total, count = 0, 0
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                total = total - F.log_softmax(logits[row, position - 1], dim=-1)[labels[row, position]]
                count += 1
    return total / count


REDUCED = ["counts", "three-summaries", "pool", "drop", "grouped-contiguous", "ffn-for-all", "retained-only"]
REDUCED += ["some-layers", "drop-later", "sized", "sized-in-cache"]


@pytest.mark.parametrize("name", REDUCED)
def test_loss_and_gradients_are_those_of_the_reference(inputs, name):
    """From the LM head through merge and summaries down to the vision tower."""
    model, labels = tiny_llava(dtype=F64), labels_for(inputs)
    with attach(model, CONFIGS[name]) as skip:
        train_summary(skip.summary)
        out = model(**inputs, labels=labels, use_cache=False)
        loss = loss_by_hand(out.logits, labels)
        torch.testing.assert_close(out.loss.double(), loss)  # Hugging Face's is float32
        loss.backward()
    own = {name: p.grad for name, p in skip.summary.named_parameters()}
    skip.summary.zero_grad()
    got = gradients(model)
    expected = loss_by_hand(naive.logits(model, inputs, CONFIGS[name], skip.summary), labels)
    close(loss, expected)
    expected.backward()
    for parameter, gradient in gradients(model).items():
        assert (got[parameter] is None) == (gradient is None), parameter
        if gradient is not None:
            close(got[parameter], gradient)
    for parameter, weight in skip.summary.named_parameters():
        close(own[parameter], weight.grad)
        assert learns(parameter, own[parameter])


def test_minus_100_is_not_supervised(inputs):
    model, labels = tiny_llava(dtype=F64), labels_for(inputs)
    with torch.no_grad(), attach(model, CONFIGS["counts"]):
        some = labels.clone()
        some[:, :-4] = -100
        out = model(**inputs, labels=some)
        torch.testing.assert_close(out.loss.double(), loss_by_hand(out.logits, some))
        assert not torch.isclose(out.loss, model(**inputs, labels=labels).loss)


def test_gradients_reach_lora_and_summary(inputs):
    model = lora_model().train()
    with attach(model, CONFIGS["counts"]) as skip:
        train_summary(skip.summary)
        model(**inputs, labels=labels_for(inputs)).loss.backward()
        taken = gradients(model)
    assert [name for name, gradient in taken.items() if not learns(name, gradient)] == []
    kinds = [("lora_A" in name, "lora_B" in name, "skip_summary" in name) for name in taken]
    assert [sum(kind) for kind in zip(*kinds, strict=True)] == [21, 21, 3]


def test_summaries_train_under_peft_only_if_attached_after_it():
    """As attach documents: PEFT freezes the modules that it finds."""
    model = lora_model()
    with attach(model, CONFIGS["counts"]) as skip:
        assert all(parameter.requires_grad for parameter in skip.summary.parameters())


def checkpointing(model, use_reentrant):
    checkpoint_activations(model.get_base_model(), use_reentrant=use_reentrant)
    if use_reentrant:
        # Reentrant checkpoints need an input that takes gradients; the vision tower's has none.
        model.get_base_model().enable_input_require_grads()
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing") and "vision" in type(module).__module__:
                module.gradient_checkpointing = False


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible with gradient checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["counts", "no-summary", "grouped", "ffn-ratio", "drop-later", "sized"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant):
    """Also if a second forward, under another plan, runs before the first one's backward."""
    first = tiny_inputs(ROWS, padding="right", dtype=F64)
    second = tiny_inputs([["image", 3], [2, "image", 1]], padding="right", dtype=F64, seed=1)
    model = lora_model().train()
    with attach(model, CONFIGS[name]) as skip:
        train_summary(skip.summary)

        def loss(inputs):
            return model(**inputs, labels=labels_for(inputs), use_cache=False).loss

        plain = []
        for inputs in (first, second):
            loss(inputs).backward()
            plain.append(gradients(model))
        reruns = []
        layer = skip._anatomy.layers[0]
        layer.attention.register_forward_hook(lambda *_: reruns.append(torch.is_grad_enabled()))
        checkpointing(model, use_reentrant)
        one, other = loss(first), loss(second)
        before = len(reruns)
        one.backward()
        assert len(reruns) > before, "the layers ran again in backward"
        checkpointed = [gradients(model)]
        other.backward()
        checkpointed.append(gradients(model))
    for expected, actual in zip(plain, checkpointed, strict=True):
        for parameter, gradient in expected.items():
            close(actual[parameter], gradient)


def test_a_loss_over_two_forwards(inputs):
    """Backward once through both: each layer finds the plan of its own call."""
    other = tiny_inputs([["image", 3], [2, "image", 1]], padding="right", dtype=F64, seed=1)
    model = lora_model().train()
    with attach(model, CONFIGS["counts"]):
        alone = []
        for batch in (inputs, other):
            model(**batch, labels=labels_for(batch)).loss.backward()
            alone.append(gradients(model))
        losses = [model(**batch, labels=labels_for(batch)).loss for batch in (inputs, other)]
        (losses[0] + losses[1]).backward()
        together = gradients(model)
    for name, gradient in together.items():
        close(gradient, alone[0][name] + alone[1][name])


def test_a_step_changes_adapter_and_summary_and_nothing_else(inputs):
    model = lora_model().train()
    with attach(model, CONFIGS["counts"]):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = model(**inputs, labels=labels_for(inputs)).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert losses == sorted(losses, reverse=True)
    assert {("lora" in name) or ("skip_summary" in name) for name in changed} == {True}
    assert len(changed) == 45


def test_mixed_precision(inputs):
    model = lora_model().float().train()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with attach(model, CONFIGS["counts"]) as skip:
        train_summary(skip.summary)
        expected = model(**inputs, labels=labels_for(inputs)).loss
        expected.backward()
        full = gradients(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=labels_for(inputs)).loss
        loss.backward()
        half = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    for name in [name for name in full if not name.endswith("norm.bias")]:
        gradient = full[name]
        assert F.cosine_similarity(gradient.flatten(), half[name].flatten(), dim=0) > 0.98, name
