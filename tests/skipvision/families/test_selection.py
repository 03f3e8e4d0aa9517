"""In every family each image retains the configured number of tokens, those with the highest scores."""

import pytest
import torch

from skipvision import ConfigError, SkipConfig, TokenRole, attach
from skipvision.anatomy.families import dissect
from skipvision.testing.families import tiny_batch
from tests.skipvision.families import reference
from tests.skipvision.families.matrix import ROWS, combinations, model_of
from tests.skipvision.family_table import LEFT_OUT

ALONE = [[2, "image", 3], [1, "small image", 2], ["large image", 4]]


@torch.no_grad()
def plan_of(model, batch, config):
    with attach(model, config) as skip:
        model(**batch)
    return skip.plan


def images_of(plan):
    """Yield the row of each image, its caller positions, and those that are retained and skipped."""
    images = []
    for number in range(plan.images):
        row = int((plan.group // 2 == number).any(dim=1).nonzero())
        into = plan.merged_into[row]
        own = (into >= 0) & (plan.group[row, into] // 2 == number)
        stays = [
            plan.source[row, (plan.group[row] // 2 == number) & (plan.roles[row] == role)].tolist()
            for role in (TokenRole.RETAINED, TokenRole.SKIPPED)
        ]
        images.append((row, own.nonzero().flatten().tolist(), *stays))
    return images


@combinations(turn=1, halved=True)
def test_counts_and_fractions_of_each_image(family, attention, dtype):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ALONE)
    placeholders = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    for config in (
        SkipConfig(retained=3, skipped=2, select="norm"),
        SkipConfig(retained=0.5, skipped=0.25, select="norm"),
        SkipConfig(retained=3, skipped=0.25, select="norm"),
    ):
        images = images_of(plan_of(model, batch, config))
        rows = [row for row, *_ in images]
        for row, own, retained, skipped in images:
            # An image may be several tiles of one size in its row.
            assert len(own) * rows.count(row) == placeholders[row]
            assert (len(retained), len(skipped)) == config.counts(len(own))[:2]


def norms(model, batch):
    """(B, T) norms of the untouched decoder's inputs."""
    return reference.watch(model, lambda: model(**batch)).embeds.norm(dim=-1)


@torch.no_grad()
def ffn_ratios(model, batch):
    """(B, T) change of each token by the first layer's FFN, from its output with and without the FFN's."""
    layer, outputs = next(layer for layer in dissect(model).layers if layer.mlp is not None), []

    def keep(module, args, output):
        # Hyper-connections have several streams for each token.
        outputs.append((output if isinstance(output, torch.Tensor) else output[0]).float().flatten(2))

    def silence(mlp, args, output):
        return (0 * output[0], *output[1:]) if isinstance(output, tuple) else 0 * output

    handles = [layer.whole.register_forward_hook(keep)]
    model(**batch)
    handles.append(layer.mlp.register_forward_hook(silence))
    model(**batch)
    for handle in handles:
        handle.remove()
    changed, unchanged = outputs
    return (changed - unchanged).norm(dim=-1) / unchanged.norm(dim=-1)


@pytest.mark.parametrize(("select", "scores"), [("norm", norms), ("ffn_ratio", ffn_ratios)])
@combinations(halved=True)
def test_each_image_retains_its_own_highest(family, attention, dtype, select, scores):
    model = model_of(family, attention, dtype)
    batch = tiny_batch(model, ROWS)
    layers = dissect(model).layers
    first = next(number for number, layer in enumerate(layers) if layer.mlp is not None)
    plan = plan_of(model, batch, SkipConfig(retained=0.4, skipped=0.3, select=select, probe_layer=first))
    score = scores(model, batch)
    visual = batch["input_ids"] == model.config.image_token_id
    found = torch.zeros_like(visual)
    for row, own, retained, skipped in images_of(plan):
        found[row, own] = True
        others = [position for position in own if position not in retained]
        assert score[row, retained].min() >= score[row, others].max() - 1e-5
        assert set(skipped) <= set(others)
    assert torch.equal(found, visual)


@combinations(turn=1, dtypes=["float32"], halved=True)
def test_the_last_words_attention_equals_that_of_eager_attention(family, attention, dtype):
    model = model_of(family, attention, dtype)
    layers = dissect(model).layers
    probed = next(number for number, layer in enumerate(layers) if number and layer.attends)
    config = SkipConfig(retained=0.4, skipped=0.3, select="attention", probe_layer=probed)
    batch = tiny_batch(model, ROWS)
    plan, eager, weights = plan_of(model, batch, config), model_of(family, "eager", dtype), []
    handle = (
        dissect(eager)
        .layers[probed]
        .attention.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    )
    with torch.no_grad():
        eager(**batch)
    handle.remove()
    score = weights[0].mean(dim=1)[:, -1]
    for row, own, retained, _ in images_of(plan):
        others = [position for position in own if position not in retained]
        assert score[row, retained].min() >= score[row, others].max() - 1e-6


@combinations(turn=1, halved=True)
def test_each_image_is_followed_by_its_own_summaries(family, attention, dtype):
    model = model_of(family, attention, dtype)
    plan = plan_of(model, tiny_batch(model, ROWS), SkipConfig(retained=3, skipped=2, summary_tokens=2))
    for number, (row, _own, retained, skipped) in enumerate(images_of(plan)):
        slots = plan.summary_slot[row]
        mine = (slots // 4 == number) & (slots >= 0)
        assert slots[mine].tolist() == list(range(4 * number, 4 * number + 4))
        places = mine.nonzero().flatten()
        last = int(plan.merged_into[row, max(retained + skipped)])
        assert places.tolist() == list(range(last + 1, last + 5))
        expected = [max(retained)] * 2 + [max(skipped)] * 2
        assert plan.position_source[row, places].tolist() == expected


@pytest.mark.skipif("lfm2_vl" in LEFT_OUT, reason="docs/families.md names the version of transformers")
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_without_attention_cannot_be_probed(layer):
    config = SkipConfig(retained=0.4, skipped=0.3, select="attention", probe_layer=layer)
    message = f"probe_layer={layer} is a Lfm2ShortConv, which cannot be read: set .* decoder's layers 2$"
    with pytest.raises(ConfigError, match=message):
        attach(model_of("lfm2_vl"), config)
