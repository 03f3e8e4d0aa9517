"""Limits of the families' own code; a test fails when its limit no longer exists."""

import pytest
import torch

from skipvision.anatomy.families import dissect
from skipvision.errors import UnsupportedModelError
from skipvision.testing.families import tiny_batch, tiny_model
from tests.skipvision.families import test_decoding
from tests.skipvision.families.matrix import (
    COUNTED,
    LIMITS,
    MERGING,
    MIXED_UP,
    NOT_REPEATED,
    NUMBERED,
    ONLY_EAGER,
    PADDED,
    ROUNDED,
    ROWS,
    model_of,
)
from tests.skipvision.families.running import say, scores_as_beams_and_alone, states_in_batch_and_alone
from tests.skipvision.family_table import BEFORE_5_18, LEFT_OUT, ROOT, before_5_18, since_5_18

SMALL = [[3, "small image", 24], [5], [2, "small image", 2, "small image", 12, "small image", 3]]
"""As `ROWS`, with images of one tile and one size."""


@pytest.mark.parametrize("family", MIXED_UP.families)
def test_beams_mix_up_images(family):
    """Without Skip-Vision."""
    rows = SMALL if BEFORE_5_18 else ROWS
    _, beams, alone = scores_as_beams_and_alone(model_of(family), rows)
    assert torch.allclose(beams[:4], alone[:4], atol=1e-4), "rows of one image and none"
    assert (beams[4:] - alone[4:]).abs().min() > (1e-3 if BEFORE_5_18 else 0.1), "the row of three"


@since_5_18
@pytest.mark.parametrize("family", NOT_REPEATED.families)
def test_beams_do_not_repeat_images(family):
    """Without Skip-Vision."""
    model = model_of(family)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        say(model, tiny_batch(model, [[3, "image", 4]]), 4, do_sample=False, num_beams=3)


@before_5_18
@pytest.mark.parametrize("family", NOT_REPEATED.families)
def test_beams_repeat_patches_instead_of_images(family):
    """Without Skip-Vision; in one family the patches no longer fit the images."""
    model = model_of(family)
    if family == "exaone4_5":
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            say(model, tiny_batch(model, [[3, "image", 4]]), 4, do_sample=False, num_beams=3)
        return
    _, beams, alone = scores_as_beams_and_alone(model, [[3, "image", 24]])
    assert (beams - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("limit", "row"), [(PADDED, 0), (NUMBERED, 2)], ids=["padded", "numbered"])
def test_a_row_depends_on_the_others(limit, row):
    for family in limit.families:
        in_batch, alone = states_in_batch_and_alone(model_of(family), ROWS)[row]
        assert (in_batch - alone).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in ROUNDED.families if name not in LEFT_OUT])
def test_experts_depend_on_padding_in_bfloat16(family):
    in_batch, alone = states_in_batch_and_alone(model_of(family, "sdpa", "bfloat16"), ROWS)[0]
    assert (in_batch - alone).abs().max() > 0.5
    in_batch, alone = states_in_batch_and_alone(model_of(family, "sdpa", "float32"), ROWS)[0]
    assert (in_batch - alone).abs().max() < 1e-4


@pytest.mark.parametrize("family", sorted(ONLY_EAGER))
def test_towers_without_sdpa(family):
    with pytest.raises(UnsupportedModelError, match="attention='sdpa' cannot be built"):
        tiny_model(family, attention="sdpa")


@pytest.mark.parametrize("family", COUNTED.families)
def test_queries_are_scaled_by_the_length_of_the_cache(family, monkeypatch):
    """With steps as short as these prompts, the reference and Skip-Vision differ."""
    model = model_of(family)
    for layer in dissect(model).layers:
        monkeypatch.setattr(layer.attention, "floor_scale", 8)

    def converse(turns):
        return [say(model, tiny_batch(model, ROWS), turns[0])[0]]

    with pytest.raises(AssertionError, match="not close"):
        test_decoding.compare(model, MERGING, converse)


@since_5_18
def test_the_documentation_lists_every_limit():
    page = (ROOT / "docs/families.md").read_text()
    for limit in LIMITS:
        assert f"| {', '.join(limit.families)} | {limit.reason} |" in page
