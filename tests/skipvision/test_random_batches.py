"""Random configurations on random batches through a whole model, against the row-by-row reference."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skipvision import attach
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import always_new, close, same_every_time, train_summary
from tests.skipvision.test_plan import configs

SIDE = 3
MODEL = []


def model():
    """Build one model for all examples."""
    if not MODEL:
        MODEL.append(tiny_llava(dtype=torch.float64, side=SIDE, num_hidden_layers=2))
    return MODEL[0]


# Rows have 0–3 images at any position and at least one word, or a config might leave no token.
rows = st.lists(st.one_of(st.integers(1, 3), st.just("image")), max_size=5).filter(
    lambda row: row.count("image") <= 3
)
batches = st.lists(
    st.tuples(rows, st.integers(1, 2)).map(lambda row: [*row[0], row[1]]), min_size=1, max_size=3
)
any_select = ("similarity", "diversity", "norm", "uniform", "random", "ffn_ratio")


@torch.no_grad()
def check(batch, padding, config, seed):
    inputs = tiny_inputs(batch, padding=padding, side=SIDE, dtype=torch.float64, seed=seed)
    with attach(model(), config) as skip:
        train_summary(skip.summary)
        got = model()(**inputs).logits
    assert (skip.plan is not None) == ("pixel_values" in inputs)
    real = inputs["attention_mask"].bool()
    try:
        expected = naive.logits(model(), inputs, config, skip.summary)
    except naive.Ambiguous:
        assume(False)
    close(got[real], expected[real])


arguments = {
    "batch": batches,
    "padding": st.sampled_from(["left", "right"]),
    "config": configs(select=any_select),
    "seed": st.integers(0, 9),
}


@settings(same_every_time, max_examples=40)
@given(**arguments)
def test_any_batch_under_any_config(batch, padding, config, seed):
    check(batch, padding, config, seed)


@pytest.mark.slow
@settings(always_new, max_examples=1000)
@given(**arguments)
def test_many_more_batches(batch, padding, config, seed):
    check(batch, padding, config, seed)
