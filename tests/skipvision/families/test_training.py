"""Training with Skip-Vision: gradients arrive everywhere, and checkpointing leaves them as they are."""

import pytest
import torch

from skipvision import attach
from skipvision.families import dissect
from skipvision.tiny_families import tiny_batch, tiny_model
from tests.skipvision.cases import train_summary
from tests.skipvision.families.matrix import MERGING, ROWS, combinations
from tests.skipvision.families.running import labels_of


def gradients_of(model, batch):
    """By name; and a clean slate for the next."""
    torch.manual_seed(0)
    out = model(**batch, labels=labels_of(model, batch), use_cache=False)
    assert out.loss.isfinite()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [False, True])
@combinations(turn=3)
def test_gradients_with_and_without_checkpointing(family, attention, dtype, use_reentrant):
    model = tiny_model(family, attention=attention, dtype=getattr(torch, dtype)).train()
    decoder = dissect(model).decoder
    if use_reentrant:  # which gives no gradients to a tower, whose pixels take none
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
        dissect(model).layers[0].attention.register_forward_hook(lambda *_: runs.append(1))
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        checkpointed = gradients_of(model, batch)
        assert len(runs) == 2, "the layer ran again in backward"
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)
