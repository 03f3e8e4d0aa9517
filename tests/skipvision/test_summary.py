"""A summary token is its group's mean before training and a softmax-weighted sum after."""

import pytest
import torch

from skipvision import SkipConfig, TokenRole, attach
from skipvision.merge import merge_tokens
from skipvision.summary import SummaryLayer
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision import naive
from tests.skipvision.cases import close, train_summary
from tests.skipvision.test_plan import Batch

ROWS = [[2, (9,), 1], [3], [(6,), 1, (7,)]]


def summarised(config, *, trained=True, rows=ROWS, change=None):
    """Return a batch's reduced tokens with their summaries, the plan, and the layer."""
    batch = Batch(rows)
    if change is not None:
        change(batch)
    plan = batch.plan(config)
    layer = SummaryLayer(5, config.summary_tokens, dtype=torch.float64)
    if trained:
        train_summary(layer)
    with torch.no_grad():
        return layer(merge_tokens(batch.embeds, plan), plan), plan, layer


def groups_of(plan, filled):
    """Yield (group number, its tokens (n, H), its summaries (K, H)) of every group with members."""
    for number in range(2 * plan.images):
        members = filled[plan.group == number]
        if len(members):
            first = number * plan.summary_tokens
            slots = range(first, first + plan.summary_tokens)
            yield number, members, torch.stack([filled[plan.summary_slot == slot][0] for slot in slots])


@pytest.mark.parametrize("layout", ["raster", "grouped"])
@pytest.mark.parametrize("k", [1, 3])
def test_an_untrained_summary_is_the_mean_of_its_group(k, layout):
    config = SkipConfig(retained=2, skipped=3, summary_tokens=k, layout=layout)
    filled, plan, _ = summarised(config, trained=False)
    groups = list(groups_of(plan, filled))
    assert [number for number, _, _ in groups] == [0, 1, 2, 3, 4, 5]
    for _, members, summaries in groups:
        for summary in summaries:
            close(summary, members.mean(dim=0))


@pytest.mark.parametrize("layout", ["raster", "grouped"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_trained_summary_is_the_weighted_sum_of_its_group(k, layout):
    config = SkipConfig(retained=2, skipped=3, summary_tokens=k, layout=layout)
    filled, plan, layer = summarised(config)
    for _, members, summaries in groups_of(plan, filled):
        for nth, summary in enumerate(summaries):
            close(summary, naive.sum_up(members, layer, nth))
            assert not torch.allclose(summary, members.mean(dim=0), atol=1e-3)
        assert len(summaries.unique(dim=0)) == k


@pytest.mark.parametrize(
    ("retained", "skipped", "numbers"), [(2, 0, [0, 2, 4]), (0, 2, [1, 3, 5]), (99, 99, [0, 2, 4])]
)
def test_a_group_without_members_has_no_summary(retained, skipped, numbers):
    filled, plan, layer = summarised(SkipConfig(retained=retained, skipped=skipped, summary_tokens=2))
    groups = list(groups_of(plan, filled))
    assert [number for number, _, _ in groups] == numbers
    assert plan.count(TokenRole.SUMMARY).tolist() == [2, 0, 4]
    for _, members, summaries in groups:
        close(summaries[1], naive.sum_up(members, layer, 1))


def test_only_the_summary_slots_change():
    config = SkipConfig(retained=2, skipped=3)
    filled, plan, _ = summarised(config)
    merged = merge_tokens(Batch(ROWS).embeds, plan)
    others = plan.roles != TokenRole.SUMMARY
    assert torch.equal(filled[others], merged[others])
    assert bool((merged[~others] == 0).all())


def test_summaries_follow_their_image_in_raster_layout():
    _, plan, _ = summarised(SkipConfig(retained=2, skipped=3, summary_tokens=2))
    row = plan.roles[2].tolist()
    kept = {TokenRole.RETAINED, TokenRole.SKIPPED}
    assert [role in kept for role in row] == [True] * 5 + [False] * 5 + [True] * 5 + [False] * 4
    assert row[5:9] == row[15:19] == [TokenRole.SUMMARY] * 4
    assert plan.summary_slot[2, 5:9].tolist() == [4, 5, 6, 7], "retained group first"


@pytest.mark.parametrize("layout", ["raster", "grouped"])
def test_a_summary_takes_the_position_of_its_groups_last_token(layout):
    _, plan, _ = summarised(SkipConfig(retained=2, skipped=3, summary_tokens=2, layout=layout))
    for row in range(len(ROWS)):
        for place in (plan.roles[row] == TokenRole.SUMMARY).nonzero().flatten().tolist():
            group = int(plan.summary_slot[row, place]) // 2
            assert plan.position_source[row, place] == plan.source[row][plan.group[row] == group].max()


def test_a_summary_does_not_depend_on_other_groups():
    config = SkipConfig(retained=2, skipped=3, select="uniform", merge="pool")
    before, plan, _ = summarised(config)

    def change_last_image(batch):
        batch.embeds[2, -7:] += 1

    after, _, _ = summarised(config, change=change_last_image)
    same = (plan.summary_slot >= 0) & (plan.summary_slot < 4)
    assert torch.equal(before[same], after[same])
    other = plan.summary_slot >= 4
    assert not torch.isclose(before[other], after[other]).all(dim=1).any()


def test_the_softmax_does_not_overflow():
    config = SkipConfig(retained=2, skipped=3)
    batch = Batch(ROWS)
    plan = batch.plan(config)
    layer = SummaryLayer(5, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.score.weight.fill_(0)[0, 0] = 1e6
        filled = layer(merge_tokens(batch.embeds, plan), plan)
    for _, members, summaries in groups_of(plan, filled):
        winner = layer.norm(members)[:, 0].argmax()
        close(summaries[0], members[winner])


@pytest.mark.parametrize("k", [1, 2])
def test_summaries_are_differentiable(k):
    batch = Batch([[1, (5,), 1], [(4,), 2]])
    plan = batch.plan(SkipConfig(retained=2, skipped=2, summary_tokens=k))
    layer = SummaryLayer(5, k, dtype=torch.float64)
    train_summary(layer)
    reduced = merge_tokens(batch.embeds, plan).requires_grad_()
    parameters = dict(layer.named_parameters())

    def fill(values, *weights):
        named = dict(zip(parameters, weights, strict=True))
        return torch.func.functional_call(layer, named, (values, plan))

    assert torch.autograd.gradcheck(fill, (reduced, *parameters.values()))


@pytest.mark.parametrize(
    ("of_model", "of_layer"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_layer_trains_in_full_precision(of_model, of_layer):
    model = tiny_llava(dtype=of_model)
    inputs = tiny_inputs(ROWS_OF_IMAGES, dtype=of_model)
    with attach(model, SkipConfig(retained=4, skipped=4)) as skip:
        assert {p.dtype for p in skip.summary.parameters()} == {of_layer}
        logits = model(**inputs).logits
    assert logits.dtype == of_model
    assert bool(logits.isfinite().all())


ROWS_OF_IMAGES = [[3, "image", 4], [5]]


def test_the_layer_moves_and_trains_with_the_model():
    model = tiny_llava()
    with attach(model, SkipConfig(retained=4, skipped=4)) as skip:
        assert {name for name in model.state_dict() if "summary" in name} == {
            "model.language_model.skip_summary.norm.weight",
            "model.language_model.skip_summary.norm.bias",
            "model.language_model.skip_summary.score.weight",
        }
        model.train()
        assert skip.summary.training
        model.to(torch.float64)
        assert skip.summary.score.weight.dtype == torch.float64
