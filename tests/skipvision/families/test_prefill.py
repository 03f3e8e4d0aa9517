"""A reduced forward pass equals the full-length one with masks, in every family."""

import pytest

from skipvision import SkipConfig, attach
from skipvision.testing.families import tiny_batch
from tests.skipvision.cases import train_summary
from tests.skipvision.families import reference
from tests.skipvision.families.matrix import (
    DROPPING,
    FAMILIES,
    FLOAT32_INSIDE,
    MERGING,
    ONLY_EAGER,
    ONLY_FLOAT32,
    ROWS,
    TOLERANCE,
    combinations,
    model_of,
)
from tests.skipvision.families.running import close, states_of


def compare(model, config, padding, tolerance):
    batch = tiny_batch(model, ROWS, padding=padding)

    def run():
        return model(**batch)

    with attach(model, config) as skip:
        train_summary(skip.summary)
        got, _ = states_of(model, run)
        assert not skip.plan.is_identity
    seen = reference.watch(model, run)
    fate = reference.decide([skip.plan], seen)
    expected = reference.hidden_states(model, seen, fate, config, skip.summary)
    real = batch["attention_mask"].bool()
    assert got.dtype == expected.dtype
    close(got[real], expected[real], tolerance)


@combinations()
def test_skipping_is_masking(family, attention, dtype):
    model = model_of(family, attention, dtype)
    compare(model, MERGING, "left", TOLERANCE)
    compare(model, DROPPING, "right", TOLERANCE)


CONFIGS = {
    "merging": MERGING.model_copy(update={"summary_tokens": 0}),
    "pooling": SkipConfig(retained=2, skipped=3, merge="pool", select="uniform", summary_tokens=1),
    "retained-only": SkipConfig(retained=3, skipped=0, select="norm", summary_tokens=1),
    "skipped-only": SkipConfig(retained=0, skipped=3, select="norm", summary_tokens=1),
    "ffn-for-all": MERGING.model_copy(update={"skip_ffn": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@combinations(dtypes=("float32",), halved=True)
def test_under_other_configs(family, attention, dtype, name, padding):
    compare(model_of(family, attention, dtype), CONFIGS[name], padding, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ONLY_FLOAT32 | FLOAT32_INSIDE | ONLY_EAGER]
)
def test_skipping_is_masking_in_float64(family):
    """Closer than in float32, although norms and rotations stay float32 in float64 models."""
    model = model_of(family, "sdpa", "float64")
    compare(model, MERGING, "left", 1e-9)
    compare(model, DROPPING, "right", 1e-9)
