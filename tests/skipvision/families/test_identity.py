"""If nothing is skipped, every family computes what its untouched model does, bit for bit."""

import torch

from skipvision import SkipConfig, attach
from skipvision.testing.families import tiny_batch
from tests.skipvision.families.matrix import ROWS, combinations, model_of
from tests.skipvision.families.running import labels_of


def everything(model, batch):
    """Return loss, logits and all gradients; generated tokens, their scores, and the cache."""
    out = model(**batch, labels=labels_of(model, batch), use_cache=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(out.loss, trained, allow_unused=True)
    said = model.generate(
        **batch,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    cached = [tensor for layer in said.past_key_values.layers for tensor in tensors_of(layer)]
    return [out.loss, out.logits, *gradients, said.sequences, *said.scores, *cached]


def tensors_of(layer):
    """Return the keys and values of a cache's layer, or the states of a recurrent one."""
    if hasattr(layer, "conv_states"):
        return [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return [layer.keys, layer.values]


def same(actual, expected):
    return actual is expected if expected is None else torch.equal(actual, expected)


@combinations()
def test_nothing_skipped_is_the_untouched_model(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    expected = everything(model, batch)
    with attach(model, SkipConfig.full()) as skip:
        actual = everything(model, batch)
        assert skip.plan.is_identity
    assert len(actual) == len(expected)
    assert all(map(same, actual, expected))
