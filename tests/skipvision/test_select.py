"""Each criterion equals its reference loop, for images of different sizes at once."""

from itertools import pairwise

import pytest
import torch

from skipvision import InputError, SkipConfig, attach
from skipvision.anatomy.attention import Attended
from skipvision.anatomy.families import dissect
from skipvision.anatomy.probe import EarlyRun, ffn_ratio
from skipvision.determinantal import by_relevance, choose_by_torch
from skipvision.select import CRITERIA, by_diversity, chain_by_torch, top
from skipvision.testing.llava import tiny_inputs, tiny_llava
from skipvision.tokens import VisualTokens
from tests.skipvision import naive
from tests.skipvision.cases import ROWS, close

SIZES = [16, 7, 1, 12]
RETAINED = [5, 3, 0.5, 0.3, 1, 1.0, 0]
BY_FEATURES = ["similarity", "diversity", "norm", "uniform", "random"]


def ragged(sizes=SIZES, width=6, seed=1, dtype=torch.float64):
    """Return random features, with garbage after the last token of smaller images."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(sizes), max(sizes), width, generator=generator, dtype=dtype)
    valid = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    features[~valid] = 1e6
    return features, valid


def retained_by(select, features, valid, counts, seed=0):
    counts = torch.tensor(counts)
    return top(CRITERIA[select].score(VisualTokens(features, valid), counts, seed), valid, counts)


@pytest.mark.parametrize("amount", RETAINED)
@pytest.mark.parametrize("select", BY_FEATURES)
def test_each_criterion_equals_its_loop(select, amount):
    config = SkipConfig(retained=amount, skipped=2, select=select, seed=7)
    features, valid = ragged()
    counts = [config.counts(size)[0] for size in SIZES]
    got = retained_by(select, features, valid, counts, seed=7)
    for image, (size, count) in enumerate(zip(SIZES, counts, strict=True)):
        expected = naive.retain(features[image, :size].tolist(), count, config)
        assert set(got[image].nonzero().flatten().tolist()) == expected, f"image of {size} tokens"


def test_redundancy_is_the_sum_of_cosines():
    features, valid = ragged([9])
    expected = naive.redundancy(features[0].tolist())
    close(VisualTokens(features, valid).redundancy[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("select", BY_FEATURES)
def test_an_image_does_not_depend_on_the_others(select):
    features, valid = ragged()
    together = retained_by(select, features, valid, [8, 2, 1, 5])
    for image, (size, count) in enumerate(zip(SIZES, [8, 2, 1, 5], strict=True)):
        alone = retained_by(
            select, features[image : image + 1, :size], valid[image : image + 1, :size], [count]
        )
        assert torch.equal(together[image, :size], alone[0]), f"image of {size} tokens"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("select", BY_FEATURES)
def test_a_small_image_is_not_disturbed_by_a_large_one(select, seed):
    """The large image takes more steps than the small one has tokens."""
    features, valid = ragged([4, 16], seed=seed)
    together = retained_by(select, features, valid, [2, 8])
    alone = retained_by(select, features[:1, :4], valid[:1, :4], [2])
    assert torch.equal(together[:1, :4], alone)


def test_both_chains_of_the_farthest_tokens_are_equal(monkeypatch):
    """A GPU runs the one without a loop over images."""
    features, valid = ragged([16, 7, 1, 12, 16])
    counts = torch.tensor([16, 3, 1, 5, 9])
    by_numpy = by_diversity(VisualTokens(features, valid), counts, 0)
    monkeypatch.setattr("skipvision.select.chain_by_numpy", chain_by_torch)
    assert torch.equal(by_diversity(VisualTokens(features, valid), counts, 0), by_numpy)


def relevant(features, valid, counts, reading=None):
    """Return the mask that "relevance" retains, by random readings or given ones."""
    if reading is None:
        reading = torch.rand(valid.shape, generator=torch.Generator().manual_seed(5), dtype=features.dtype)
    counts = torch.tensor(counts)
    return top(by_relevance(VisualTokens(features, valid, reading), counts, 0), valid, counts)


def test_both_ways_to_the_largest_determinants_are_equal(monkeypatch):
    """Also for images of fewer tokens, and if more are retained than there are dimensions."""
    features, valid = ragged([16, 7, 1, 12, 16])
    by_numpy = relevant(features, valid, [16, 3, 1, 5, 9])
    assert by_numpy.sum(dim=1).tolist() == [16, 3, 1, 5, 9]
    monkeypatch.setattr("skipvision.determinantal.choose_by_numpy", choose_by_torch)
    assert torch.equal(relevant(features, valid, [16, 3, 1, 5, 9]), by_numpy)


def test_relevance_is_weighed_against_diversity():
    """Of two equal tokens one is chosen; a relevant token comes before an irrelevant one."""
    features = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2, 3]][None]
    reading = torch.tensor([[1.0, 0.9, 0.8, 0.7, 0.0]], dtype=torch.float64)
    valid = torch.ones(1, 5, dtype=torch.bool)
    chosen = [
        relevant(features, valid, [count], reading)[0].nonzero().flatten().tolist() for count in range(6)
    ]
    assert chosen == [[], [0], [0, 2], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    same = torch.ones_like(reading)
    assert relevant(features, valid, [4], same)[0].tolist() == [True, False, True, True, True]


def test_a_prompt_without_text_is_refused():
    model, inputs = tiny_llava(dtype=torch.float64), tiny_inputs([[2, "image"], ["image", 0]])
    config = SkipConfig(retained=4, skipped=4, select="relevance")
    with attach(model, config), pytest.raises(InputError, match="select='relevance' compares images with"):
        model(**{name: value.double() if name == "pixel_values" else value for name, value in inputs.items()})


def test_random_is_fixed_by_its_seed():
    features, valid = ragged([16, 16])
    first = retained_by("random", features, valid, [6, 6], seed=1)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first, retained_by("random", -features, valid, [6, 6], seed=1))
    assert not torch.equal(first, retained_by("random", features, valid, [6, 6], seed=2))


def test_random_keeps_its_tokens_as_the_count_grows():
    features, valid = ragged([64])
    drawn = [retained_by("random", features, valid, [count])[0] for count in range(65)]
    for fewer, more in pairwise(drawn):
        assert bool((more | ~fewer).all())
        assert int(more.sum()) == int(fewer.sum()) + 1


def test_random_orders_a_smaller_image_like_the_beginning_of_a_larger_one():
    large = CRITERIA["random"].score(VisualTokens(*ragged([100])), torch.tensor([1]), 4)
    small = CRITERIA["random"].score(VisualTokens(*ragged([37])), torch.tensor([1]), 4)
    assert torch.equal(large[:, :37], small)


def test_ties_go_to_the_earlier_token():
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]])
    got = top(scores, torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]))
    assert got.tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("select", BY_FEATURES)
def test_half_precision_features_are_scored_in_full_precision(select):
    features, valid = ragged([16], width=32, dtype=torch.float32)
    half = features.to(torch.bfloat16)
    assert torch.equal(retained_by(select, half, valid, [6]), retained_by(select, half.double(), valid, [6]))


@pytest.mark.parametrize("select", BY_FEATURES)
def test_choosing_keeps_no_gradient(select):
    features, valid = ragged()
    tokens = VisualTokens(features.requires_grad_(), valid)
    scores = CRITERIA[select].score(tokens, torch.tensor([5, 3, 1, 4]), 0)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("retained", "skipped", "tokens", "expected"),
    [
        (100, 156, 576, (100, 156)),
        (100, 156, 200, (100, 100)),
        (100, 156, 60, (60, 0)),
        (0.25, 0.25, 576, (144, 144)),
        (0.25, 0.25, 10, (3, 3)),
        (0.001, 0.001, 10, (1, 1)),
        (0.5, 0.5, 7, (4, 3)),
        (1.0, 0.5, 7, (7, 0)),
        (1, 1.0, 7, (1, 6)),
        (0.0, 0.0, 7, (0, 0)),
        (0, 3, 0, (0, 0)),
    ],
)
def test_counts_and_fractions(retained, skipped, tokens, expected):
    assert SkipConfig(retained=retained, skipped=skipped, merge="drop").counts(tokens)[:2] == expected


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [(16, (5, 4, 4)), (5, (5, 0, 2)), (0, (0, 0, 0))],
)
def test_each_group_with_members_has_its_summaries(tokens, counts):
    found = SkipConfig(retained=5, skipped=4, summary_tokens=2).counts(tokens)
    assert (found.retained, found.skipped, found.summaries) == counts
    assert found.total == sum(counts)


def early_run(model, layer, embeds, mask=None):
    real = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    anatomy = dissect(model)
    call = {"inputs_embeds": embeds, **({} if mask is None else {"attention_mask": mask})}
    return EarlyRun(anatomy.decoder, anatomy.layers[layer], call, real, real)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("probe_layer", [0, 1, 2])
def test_ffn_ratio_is_read_at_its_layer(probe_layer, padding):
    model = tiny_llava(dtype=torch.float64)
    decoder = model.model.language_model
    inputs = tiny_inputs(ROWS, padding=padding, dtype=torch.float64)
    rows = naive.embed_rows(model, inputs)
    embeds = torch.zeros(*inputs["input_ids"].shape, 32, dtype=torch.float64)
    embeds[inputs["attention_mask"].bool()] = torch.cat(rows).detach()
    layers_run = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=n: layers_run.append(n))
        for n, layer in enumerate(decoder.layers)
    ]
    got = ffn_ratio(early_run(model, probe_layer, embeds, inputs["attention_mask"]))
    for handle in handles:
        handle.remove()
    assert layers_run == list(range(probe_layer + 1)), "later layers are not run"
    for number, row in enumerate(rows):
        expected = torch.tensor(naive.ffn_ratio(decoder, row[None], probe_layer), dtype=torch.float64)
        real = got[number][inputs["attention_mask"][number].bool()]
        # Rotary embeddings are float32 in Hugging Face models, and padding shifts positions.
        torch.testing.assert_close(real, expected, rtol=1e-5, atol=1e-6)
    assert not got.requires_grad


@pytest.mark.parametrize("how", ["plain", "softcap", "window", "boolean mask", "added mask"])
def test_attention_received_is_the_mean_of_rows_of_weights(how):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 6, 3, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 6, 3, generator=generator, dtype=torch.float64)
    sees = torch.ones(6, 6, dtype=torch.bool).tril()
    options, mask = {"scaling": 0.5}, None
    compared = 0.5 * torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, dim=1))
    if how == "softcap":
        options["softcap"] = 0.3
        compared = 0.3 * (compared / 0.3).tanh()
    elif how == "window":
        options["sliding_window"] = 2
        sees = sees & ~torch.ones(6, 6, dtype=torch.bool).tril(-2)
    elif how != "plain":
        mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.7
        mask = mask | torch.eye(6, dtype=torch.bool)
        compared = compared.masked_fill(~mask, -torch.inf)
        if how == "added mask":
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    weights = compared.masked_fill(~sees, -torch.inf).softmax(dim=3)
    for row, place in ((0, 5), (1, 3)):
        queries = torch.tensor([[5], [3]])
        got = Attended(query, key, mask, options).received(queries, torch.arange(6) <= queries)
        close(got[row], weights[row, :, place].mean(dim=0))


def test_ffn_ratio_in_training_does_not_measure_dropout():
    """An FFN that adds nothing changes nothing, whatever attention drops."""
    model = tiny_llava(dtype=torch.float64, attention="eager", attention_dropout=0.5).train()
    run = early_run(model, 1, torch.randn(2, 9, 32, dtype=torch.float64))
    assert ffn_ratio(run).min() > 0
    run.layer.mlp.down_proj.weight.data.zero_()
    assert ffn_ratio(run).max() == 0
