"""Training: gradients reach every parameter, and checkpointing does not change them."""

import pytest
import torch
from torch.nn import functional as F

from skipvision import attach
from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.cases import checkpoint_activations, train_summary
from tests.skipvision.families.matrix import FAMILIES, MERGING, ROWS, combinations
from tests.skipvision.families.running import labels_of


def gradients_of(model, batch):
    """Return the gradients by name, and clear them."""
    torch.manual_seed(0)
    out = model(**batch, labels=labels_of(model, batch), use_cache=False)
    assert out.loss.isfinite()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


SHARED_KEYS = {"mistral_large4"}
"""Families in which layers read another one's keys, which get no gradients from reentrant checkpoints."""


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, True])
@combinations(turn=3, halved=True)
def test_gradients_with_and_without_checkpointing(family, attention, dtype, use_reentrant):
    model = tiny_model(family, attention=attention, dtype=getattr(torch, dtype)).train()
    decoder = dissect(model).decoder
    if use_reentrant and family in SHARED_KEYS:
        pytest.skip("the untouched model loses the same gradients")
    if use_reentrant:  # It gives no gradients to a tower, because pixels take none.
        model.requires_grad_(False)
        decoder.requires_grad_(True)
    batch = tiny_batch(model, ROWS, padding="right")
    untouched = gradients_of(model, batch)
    with attach(model, MERGING) as skip:
        train_summary(skip.summary)
        plain = gradients_of(model, batch)
        assert not skip.plan.is_identity
        assert all(gradient.isfinite().all() for gradient in plain.values())
        assert untouched.keys() < plain.keys()
        runs = []
        dissect(model).layers[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
        checkpoint_activations(model, use_reentrant=use_reentrant)
        checkpointed = gradients_of(model, batch)
        assert len(runs) == 2, "the layer ran again in backward"
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


STEP = 1e-5
"""Size of a change of weights that is too small to change a plan."""
SMALL_STEPS = {"dots3_note", "granite4_vision", "perception_lm"}
"""Families in which it moves a token to another expert or into another token, but a tenth of it does not."""


def exact_loss(model, batch):
    """Compute the loss in float64: families' own is in float32, too coarse for small changes."""
    logits, labels = model(**batch, use_cache=False).logits, labels_of(model, batch)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())


DIFFERENTIATED = {"gemma3", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl_moe", "smolvlm"}


JUMPING = {"aria", "ernie4_5_vl_moe", "glm4v_moe", "muse_spark", "qwen3_5_moe", "fast_vlm"}
"""Mixtures of experts whose loss jumps: a small change may move a token to another expert; and a family whose
tiny tower makes tokens so alike that it may merge others."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in DIFFERENTIATED else pytest.mark.slow)
        for name in FAMILIES
        if name not in JUMPING
    ],
)
def test_gradients_are_the_slopes_of_the_loss(family):
    """Compare with loss differences along a random change of all weights, without another backward."""
    model = tiny_model(family, dtype=torch.float64)
    for module in model.modules():
        if hasattr(
            module, "index_topk"
        ):  # A small change may move a query to other keys, and the loss jumps.
            module.index_topk = 2048
    batch = tiny_batch(model, ROWS, padding="right")
    generator = torch.Generator().manual_seed(1)
    size = STEP / 10 if family in SMALL_STEPS else STEP
    # After a layer norm all norms are alike, so any change of weights would change a plan made by norms.
    with attach(model, MERGING.model_copy(update={"select": "uniform"})) as skip:
        train_summary(skip.summary)
        exact_loss(model, batch).backward()
        assert not skip.plan.is_identity
        # The parameters that the untouched model trains too, as the test above checks.
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        assert any("summary" in name for name in trained)
        change = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in trained.items()
        }
        expected = float(sum((p.grad * change[name]).sum() for name, p in trained.items()))
        losses = []
        with torch.no_grad():
            for step in (size, -2 * size):
                for name, parameter in trained.items():
                    parameter.add_(step * change[name])
                losses.append(float(exact_loss(model, batch)))
    # Some families compute norms in float32.
    assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(expected, rel=2e-2, abs=3e-2)
