"""Each merge equals its reference loop, and means conserve mass."""

import pytest
import torch

from skipvision import SkipConfig, TokenRole
from skipvision.merge import MERGES, assign, merge_tokens
from skipvision.tokens import VisualTokens
from tests.skipvision import naive
from tests.skipvision.cases import close
from tests.skipvision.test_plan import Batch

SIZES = [16, 7, 1, 12]
ROWS = [[3, (16,), 2], [4], [(7,), 1, (12,), (1,)]]
METHODS = ["similarity", "pool", "drop", "tome"]


def matching(method, retained_count, skipped_count, seed=0):
    """Return features of ragged images, the retained tokens, and the decision of `assign`."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(SIZES), max(SIZES), 6, generator=generator, dtype=torch.float64)
    valid = torch.arange(max(SIZES)) < torch.tensor(SIZES)[:, None]
    retained = (torch.rand(valid.shape, generator=generator).argsort(dim=1) < retained_count) & valid
    skipped = torch.tensor([skipped_count] * len(SIZES)).minimum((valid & ~retained).sum(dim=1))
    tokens = VisualTokens(features, valid)
    return features, valid, retained, assign(tokens, retained, MERGES[method].ends(tokens, retained, skipped))


@pytest.mark.parametrize("skipped", [1, 3, 8, 16])
@pytest.mark.parametrize("retained", [0, 1, 5, 16])
@pytest.mark.parametrize("method", METHODS)
def test_each_merge_equals_its_loop(method, retained, skipped):
    features, valid, kept, got = matching(method, retained, skipped)
    for image, size in enumerate(SIZES):
        own = set(kept[image].nonzero().flatten().tolist())
        expected = naive.hosts(features[image, :size].tolist(), own, skipped, method)
        assert got[image, :size].tolist() == expected, f"image of {size} tokens"
    assert bool((got[~valid] == -1).all())


@pytest.mark.parametrize(
    ("skipped", "cells"), [(1, (1, 1)), (4, (2, 2)), (8, (2, 4)), (12, (3, 4)), (16, (4, 4))]
)
def test_a_grid_is_pooled_as_torch_does_it(skipped, cells):
    """Compared with torch if its cells do not overlap, because their sides divide the square's."""
    config = SkipConfig(retained=0, skipped=skipped, merge="grid", summary_tokens=0)
    batch = Batch([[2, (16,), 1]])
    merged = merge_tokens(batch.embeds, plan := batch.plan(config))[0, plan.roles[0] == TokenRole.SKIPPED]
    assert int(plan.mass[0].sum()) == batch.longest
    if all(4 % part == 0 for part in cells):
        square = batch.embeds[0, 2:18].T.unflatten(1, (4, 4))
        close(merged, torch.nn.functional.adaptive_avg_pool2d(square, cells).flatten(1).T)
    assert len(merged) == cells[0] * cells[1]


@pytest.mark.parametrize("side", [1, 2, 5, 7, 16])
def test_a_grid_has_as_many_cells_as_counted(side):
    config = {n: SkipConfig(retained=0, skipped=n, merge="grid") for n in range(1, side**2 + 1)}
    for asked, own in config.items():
        batch = Batch([[(side**2,)]])
        cells = own.counts(side**2).skipped
        assert asked - 2 * asked**0.5 <= cells <= asked
        plan = batch.plan(own)
        ends = plan.source[0, plan.merged_into[0]].tolist()
        assert len(set(ends)) == cells
        assert ends == naive.hosts([[1.0]] * side**2, set(), cells, "grid")


def test_matching_in_halves_merges_no_more_than_it_must():
    """Of seven tokens three stay: the first, third, fifth and seventh leave in one round."""
    batch = Batch([[(7,)]])
    plan = batch.plan(SkipConfig(retained=0, skipped=3, merge="tome", summary_tokens=0))
    assert plan.source[0].tolist() == [1, 3, 5]


def test_without_skipped_tokens_the_rest_joins_the_most_similar_retained():
    batch = Batch([[1, (12,)], [(9,)]])  # The second row has 4 positions of padding before it.
    plan = batch.plan(SkipConfig(retained=4, skipped=0))
    assert not bool((plan.roles == TokenRole.SKIPPED).any())
    retained = (plan.roles[1] == TokenRole.RETAINED).nonzero().flatten().tolist()
    features = batch.embeds[1, 4:].tolist()
    for position in range(4, 13):
        similarity = {
            place: naive.cosine(features[position - 4], batch.embeds[1, plan.source[1, place]].tolist())
            for place in retained
        }
        assert int(plan.merged_into[1, position]) == max(similarity, key=similarity.__getitem__)


def test_pooled_runs_are_neighbours_of_equal_length():
    batch = Batch([[(17,)]])
    plan = batch.plan(SkipConfig(retained=0, skipped=5, merge="pool", summary_tokens=0))
    runs = plan.merged_into[0].tolist()
    assert runs == sorted(runs)
    assert sorted(runs.count(run) for run in range(5)) == [3, 3, 3, 4, 4]
    middles = plan.source[0].tolist()
    for run, middle in enumerate(middles):
        members = [position for position in range(17) if runs[position] == run]
        assert middle == members[(len(members) - 1) // 2]


def reduced_by(config, padding="left"):
    batch = Batch(ROWS, padding)
    plan = batch.plan(config)
    return batch, plan, merge_tokens(batch.embeds, plan)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layout", ["raster", "grouped"])
@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_the_mean_of_what_was_merged_into_it(method, layout, padding):
    config = SkipConfig(retained=3, skipped=2, merge=method, layout=layout)
    batch, plan, merged = reduced_by(config, padding)
    for row in range(len(ROWS)):
        for place in range(plan.roles.shape[1]):
            members = [p for p in range(batch.longest) if plan.merged_into[row, p] == place]
            expected = batch.embeds[row, members].mean(dim=0) if members else torch.zeros(5).double()
            close(merged[row, place], expected)


@pytest.mark.parametrize("method", ["similarity", "pool", "tome"])
def test_mass_is_conserved(method):
    batch, plan, merged = reduced_by(SkipConfig(retained=3, skipped=2, merge=method))
    assert torch.equal(plan.mass.sum(dim=1), batch.mask.sum(dim=1))
    before = batch.embeds.masked_fill(~batch.mask[..., None], 0).sum(dim=1)
    close((plan.mass[..., None] * merged).sum(dim=1), before)


def test_dropping_conserves_the_remaining_tokens():
    batch, plan, merged = reduced_by(SkipConfig(retained=3, skipped=2, merge="drop"))
    stays = plan.merged_into >= 0
    dropped = batch.mask & ~stays
    assert dropped.sum(dim=1).tolist() == [16 - 5, 0, (7 - 5) + (12 - 5)]
    assert torch.equal(plan.mass.sum(dim=1), stays.sum(dim=1))
    close(merged.sum(dim=1), batch.embeds.masked_fill(~stays[..., None], 0).sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unmerged_tokens_are_copied_bit_for_bit(dtype):
    batch = Batch(ROWS)
    batch.embeds = batch.embeds.to(dtype)
    plan = batch.plan(SkipConfig(retained=3, skipped=2))
    merged = merge_tokens(batch.embeds, plan)
    assert merged.dtype == dtype
    alone = plan.mass == 1
    sources = plan.gather(batch.embeds, plan.source)
    assert torch.equal(merged[alone], sources[alone])
    assert 0 < int(alone.sum()) < int(plan.attention_mask.sum())


def test_half_precision_groups_are_summed_in_full_precision():
    batch = Batch([[(400,)]])
    batch.embeds = torch.ones(1, 400, 4, dtype=torch.bfloat16)
    batch.embeds[:, 200:] = 1.0078125  # the next number; a sum in bfloat16 would stall at 256
    plan = batch.plan(SkipConfig(retained=0, skipped=1, merge="pool", summary_tokens=0))
    merged = merge_tokens(batch.embeds, plan)
    assert merged.flatten().tolist() == [1.0] * 4 or merged.flatten().tolist() == [1.0078125] * 4


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_differentiable(method):
    batch = Batch([[1, (6,), 1], [(4,), 2]])
    plan = batch.plan(SkipConfig(retained=1, skipped=2, merge=method))
    embeds = batch.embeds.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: merge_tokens(values, plan), embeds)
    assert torch.autograd.gradcheck(lambda values: plan.to_caller(merge_tokens(values, plan)), embeds)


@pytest.mark.parametrize("method", METHODS)
def test_each_caller_position_gets_its_tokens_state_back(method):
    batch, plan, merged = reduced_by(SkipConfig(retained=3, skipped=2, merge=method))
    back = plan.to_caller(merged)
    assert back.shape == batch.embeds.shape
    for row in range(len(ROWS)):
        for position in range(batch.longest):
            place = int(plan.merged_into[row, position])
            expected = merged[row, place] if place >= 0 else torch.zeros(5).double()
            assert torch.equal(back[row, position], expected)
