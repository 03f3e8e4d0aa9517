"""select="views": the view of the whole image is retained, its high-resolution crops are merged."""

import pytest
import torch

from skipvision import ConfigError, SkipConfig, attach
from skipvision.anatomy.families import FAMILIES as DECLARED
from skipvision.testing.families import tiny_batch
from tests.skipvision.families import reference
from tests.skipvision.families.matrix import FAMILIES, combinations, model_of

WHOLE = {"internvl": -1, "llava_next": 0, "llava_next_video": 0, "llava_onevision": 0, "qianfan_ocr": -1}
"""Index of the whole image's view among the pixels of an image's views, as processors order them."""


def whole_view(model, batch, family):
    """(T,) visual tokens that change when the pixels of the whole image's view do."""
    pixels = batch["pixel_values"]
    changed = pixels.clone()
    views = changed.flatten(0, -4)
    views[WHOLE[family]] += torch.randn(views.shape[1:], generator=torch.Generator().manual_seed(0))
    seen = [
        reference.watch(model, lambda one=one: model(**{**batch, "pixel_values": one})).embeds
        for one in (pixels, changed)
    ]
    return (seen[0] != seen[1]).any(dim=-1)[0]


@combinations(families=sorted(WHOLE))
def test_the_base_view_is_retained_and_the_crops_are_merged(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, [[2, "large image", 3]])
    base = whole_view(model, batch, family)
    visual = batch["input_ids"][0] == model.config.image_token_id
    count = int(base.sum())
    assert 0 < count < int(visual.sum())
    with torch.no_grad(), attach(model, SkipConfig(retained=count, skipped=2, select="views")) as skip:
        model(**batch)
    plan = skip.plan
    retained, skipped = (plan.source[0, plan.group[0] == group] for group in (0, 1))
    assert retained.tolist() == base.nonzero().flatten().tolist()
    assert len(skipped) == 2
    ends = plan.source[0, plan.merged_into[0, visual & ~base]]
    assert set(ends.tolist()) <= {*retained.tolist(), *skipped.tolist()}
    assert int(plan.mass[0, plan.group[0] >= 0].sum()) == int(visual.sum())


def test_the_families_with_views_are_those_that_declare_them():
    assert {family for family, own in DECLARED.items() if own.base_view} == WHOLE.keys()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WHOLE.keys()))
def test_families_with_one_view_refuse_the_criterion(family):
    with pytest.raises(ConfigError, match="needs a multi-view family"):
        attach(model_of(family), SkipConfig(select="views"))
