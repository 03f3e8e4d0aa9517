"""Threads, models and copies share nothing, and detaching leaves nothing on the model."""

import copy
import io
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model

from skipvision import SkipConfig, attach, attachment_of
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS, checkpoint_activations, close, labels_for, train_summary

F64 = torch.float64
CONFIG = CONFIGS["counts"]
OTHER = SkipConfig(retained=3, skipped=2, merge="pool", select="norm", summary_tokens=2)
BATCHES = [
    tiny_inputs(ROWS, padding="right", dtype=F64),
    tiny_inputs([[1, "image", 2]], padding="right", dtype=F64, seed=1),
]


def attached(config=CONFIG, peft=False):
    model = tiny_llava(dtype=F64)
    if peft:
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, lora)
    train_summary(attach(model, config).summary)
    return model


@torch.no_grad()
def logits(model, inputs=BATCHES[0]):
    return model(**inputs).logits


def together(*works):
    """Run each function in its own thread at the same time; return their results or raise the first error."""
    results = [None] * len(works)

    def note(number, work):
        try:
            results[number] = work()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=note, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def keep_in_step(*models):
    """Make the calls of two threads wait for each other between every attention and its FFN."""
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_):
        barrier.wait()

    for model in models:
        for layer in attachment_of(model)._anatomy.layers:
            layer.attention.register_forward_hook(wait)


# -------------------------------------------------------------------------------------- threads


def test_one_model_called_from_two_threads_gives_each_its_own_result():
    """Between a layer's attention and FFN, the other thread has a plan of another shape."""
    model = attached()
    expected = [logits(model, inputs) for inputs in BATCHES]
    keep_in_step(model)
    got = together(*(lambda inputs=inputs: logits(model, inputs) for inputs in BATCHES))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    rows = attachment_of(model).plan.merged_into.shape[0]
    assert rows in {len(inputs["input_ids"]) for inputs in BATCHES}, "whichever call came last"


def test_two_models_with_different_configs_in_two_threads():
    models = [attached(CONFIG), attached(OTHER)]
    expected = [logits(model, inputs) for model, inputs in zip(models, BATCHES, strict=True)]
    keep_in_step(*models)
    pairs = list(zip(models, BATCHES, strict=True))
    got = together(*(lambda m=model, i=inputs: logits(m, i) for model, inputs in pairs))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    for model, inputs in pairs:
        assert attachment_of(model).plan.merged_into.shape == inputs["input_ids"].shape


def test_an_attached_and_an_untouched_model_in_two_threads():
    model, plain = attached(), tiny_llava(dtype=F64)
    expected = [logits(model), logits(plain)]
    got = together(lambda: logits(model), lambda: logits(plain))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_generating_in_two_threads():
    models = [attached(CONFIG), attached(OTHER)]

    def answer(model, inputs):
        return model.generate(**inputs, max_new_tokens=5, do_sample=False)

    inputs = tiny_inputs([[2, "image", 3]], dtype=F64)
    expected = [answer(model, inputs) for model in models]
    works = [lambda model=model: [answer(model, inputs) for _ in range(5)] for model in models]
    for all_of_one, alone in zip(together(*works), expected, strict=True):
        assert all(torch.equal(one, alone) for one in all_of_one)


def test_training_with_checkpointing_in_two_threads():
    """Each thread's backward repeats its own layers under its own plan."""

    def gradients(model, inputs):
        loss = model(**inputs, labels=labels_for(inputs), use_cache=False).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    models = [attached(config, peft=True).train() for config in (CONFIG, OTHER)]
    pairs = list(zip(models, BATCHES, strict=True))
    expected = [gradients(model, inputs) for model, inputs in pairs]
    for model in models:
        model.zero_grad()
        checkpoint_activations(model, use_reentrant=False)
    for got, alone in zip(
        together(*(lambda m=model, i=inputs: gradients(m, i) for model, inputs in pairs)),
        expected,
        strict=True,
    ):
        assert got.keys() == alone.keys()
        for name, gradient in alone.items():
            close(got[name], gradient)


def test_after_a_call_no_plan_is_left_for_a_layer_called_alone():
    model = attached()
    layer = attachment_of(model)._anatomy.layers[0].whole
    plan_of = logits(model) is not None and attachment_of(model).plan
    hidden = torch.randn(*plan_of.roles.shape, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(
            layer.mlp(hidden), tiny_llava(dtype=F64).model.language_model.layers[0].mlp(hidden)
        )


# --------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("peft", [False, True])
def test_a_copy_has_its_own_attachment(peft):
    model = attached(peft=peft)
    before = logits(model)
    twin = copy.deepcopy(model)
    skip, other = attachment_of(model), attachment_of(twin)
    assert other is not skip
    assert other.model is twin
    assert torch.equal(logits(twin), before)
    assert other.plan is not skip.plan
    with torch.no_grad():
        other.summary.score.weight.add_(1)
    changed = logits(twin)
    assert not torch.allclose(changed, before)
    assert torch.equal(logits(model), before)
    skip.detach()
    assert attachment_of(twin) is other
    assert torch.equal(logits(twin), changed)
    other.detach()
    assert attachment_of(twin) is None
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(twin), logits(model))


def test_detaching_a_copy_leaves_the_original_attached():
    model = attached()
    before = logits(model)
    attachment_of(copy.deepcopy(model)).detach()
    assert torch.equal(logits(model), before)


def test_a_copy_switches_adapters_by_itself():
    model = attached(peft=True)
    before = logits(model)
    twin = copy.deepcopy(model)
    twin.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    twin.set_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
    assert not [name for name in model.state_dict() if ".b." in name]
    assert not torch.equal(logits(twin), before)


def with_pickle(model):
    return pickle.loads(pickle.dumps(model))


def with_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("travel", [with_pickle, with_torch])
def test_an_attached_model_stays_attached_when_pickled_or_copied(travel, peft):
    """Hugging Face models can be pickled until their first run, and so can attached ones."""
    model = attached(peft=peft)
    twin = travel(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    attachment_of(twin).detach()
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------ left behind


@pytest.mark.parametrize("peft", [False, True])
def test_state_dict_names_before_during_and_after(peft):
    model = attached(peft=peft)
    skip = attachment_of(model)
    during = model.state_dict()
    own = {name.partition("skip_summary.")[2] for name in during if "skip_summary" in name}
    layer = ["norm.weight", "norm.bias", "score.weight"]
    under_peft = {
        f"{part}.{name}" for part in ("original_module", "modules_to_save.default") for name in layer
    }
    assert own == (under_peft if peft else set(layer))
    twin = attached(peft=peft)
    with torch.no_grad():
        attachment_of(twin).summary.score.weight.zero_()
    twin.load_state_dict(during)
    assert torch.equal(logits(twin), logits(model))
    skip.detach()
    assert list(model.state_dict()) == [name for name in during if "skip_summary" not in name]
    if peft:
        assert model.peft_config["default"].modules_to_save is None


def test_attaching_again_starts_afresh():
    model = attached(peft=True)
    attachment_of(model).detach()
    with attach(model, OTHER) as skip:
        assert bool((skip.summary.score.weight == 0).all())
        first = logits(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with attach(model, OTHER):
        assert torch.equal(logits(model), first)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
