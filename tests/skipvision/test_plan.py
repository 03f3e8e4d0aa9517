"""The plan of ragged images anywhere in a batch equals that of the row-by-row reference."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from skipvision import ConfigError, InputError, SkipConfig, TokenPlan, TokenRole
from skipvision.anatomy.images import Images
from skipvision.planning import make_plan
from skipvision.tokens import VisualTokens
from tests.skipvision import naive
from tests.skipvision.cases import BY_THE_MODEL, CONFIGS, always_new, same_every_time

NEEDS_NO_MODEL = {
    name: config
    for name, config in CONFIGS.items()
    if config.select not in BY_THE_MODEL and config.merge != "grid"  # images here are not squares
}


class Batch:
    """Rows of text (a count of tokens) and images (a count in a tuple), with random features."""

    def __init__(self, rows, padding="left", seed=0):
        lengths = [sum(part[0] if isinstance(part, tuple) else part for part in row) for row in rows]
        self.lengths, self.longest = lengths, max(lengths)
        # A batch without padding is treated as padded on the left.
        self.padding = padding if min(lengths) < self.longest else "left"
        self.mask = torch.zeros(len(rows), self.longest, dtype=torch.bool)
        self.images: list[list[list[int]]] = []
        visual = torch.zeros_like(self.mask)
        self.sizes = []
        for number, row in enumerate(rows):
            start = self.start(number)
            self.mask[number, start : start + lengths[number]] = True
            self.images.append([])
            at = 0
            for part in row:
                if isinstance(part, tuple):
                    self.images[-1].append(list(range(at, at + part[0])))
                    self.sizes.append(part[0])
                    visual[number, start + at : start + at + part[0]] = True
                at += part[0] if isinstance(part, tuple) else part
        generator = torch.Generator().manual_seed(seed)
        self.embeds = torch.randn(len(rows), self.longest, 5, generator=generator, dtype=torch.float64)
        self.located = Images.locate(visual, self.sizes)

    def start(self, row):
        return self.longest - self.lengths[row] if self.padding == "left" else 0

    def plan(self, config) -> TokenPlan:
        tokens = VisualTokens(self.located.take(self.embeds), self.located.valid)
        return make_plan(tokens, self.located, self.mask, config)

    def expected(self, config):
        """Return the reference's tokens and landings of each row, with positions in the padded row."""
        first_image = 0
        for number, images in enumerate(self.images):
            start = self.start(number)
            features = [self.embeds[number, start:][positions].tolist() for positions in images]
            yield naive.reduce_row(self.lengths[number], images, features, config, first_image=first_image)
            first_image += len(images)


def assert_is_naive(plan: TokenPlan, batch: Batch, config: SkipConfig) -> None:
    """Compare every field of a plan, token by token."""
    expected = list(batch.expected(config))
    reduced = max(len(tokens) for tokens, _ in expected)
    assert plan.roles.shape == (len(expected), reduced)
    assert plan.roles.dtype == torch.uint8
    for row, (tokens, lands) in enumerate(expected):
        start = batch.start(row)
        shift = reduced - len(tokens) if batch.padding == "left" else 0
        own = slice(shift, shift + len(tokens))

        def place(position, start=start):
            return position + start if position >= 0 else -1

        def field(values, own=own, row=row):
            return values[row, own].tolist()

        assert field(plan.roles) == [token.role for token in tokens]
        assert field(plan.source) == [place(token.source) for token in tokens]
        assert field(plan.position_source) == [place(token.position_source) for token in tokens]
        assert field(plan.summary_slot) == [token.summary_slot for token in tokens]
        assert field(plan.group) == [token.group for token in tokens]
        assert field(plan.mass) == [len(token.mean_of) for token in tokens]
        into = [-1] * batch.longest
        for position, place_of in enumerate(lands):
            into[start + position] = shift + place_of if place_of >= 0 else -1
        assert plan.merged_into[row].tolist() == into
        assert int(plan.removed[row]) == batch.lengths[row] - len(tokens)
        padding = torch.ones(reduced, dtype=torch.bool)
        padding[own] = False
        assert bool((plan.roles[row][padding] == TokenRole.PADDING).all())
        for values in (plan.source, plan.position_source, plan.summary_slot, plan.group):
            assert bool((values[row][padding] == -1).all())


def assert_consistent(plan: TokenPlan, batch: Batch, config: SkipConfig) -> None:
    """Check what holds for every plan, whatever the criterion."""
    there, skipped = plan.roles != TokenRole.PADDING, plan.roles == TokenRole.SKIPPED
    assert torch.equal(plan.attention_mask, there)
    assert torch.equal(plan.ffn_mask, there & ~(skipped & config.skip_ffn))
    assert torch.equal(plan.cache_mask, there & ~(skipped & config.skip_kv))
    assert plan.images == len(batch.sizes)
    assert plan.summary_tokens == config.summary_tokens
    counts = [config.counts(size) for size in batch.sizes]
    k = config.summary_tokens
    number = 0
    for row, images in enumerate(batch.images):
        own = counts[number : number + len(images)]
        number += len(images)
        text = batch.lengths[row] - sum(len(positions) for positions in images)
        assert int(plan.count(TokenRole.RETAINED)[row]) == sum(one.retained for one in own)
        assert int(plan.count(TokenRole.SKIPPED)[row]) == sum(one.skipped for one in own)
        assert int(plan.count(TokenRole.SUMMARY)[row]) == sum(
            k * ((one.retained > 0) + (one.skipped > 0)) for one in own
        )
        assert int(plan.count(TokenRole.TEXT)[row]) == text
        # A survivor ends in itself.
        for place, source in enumerate(plan.source[row].tolist()):
            if source >= 0:
                assert int(plan.merged_into[row, source]) == place
        if config.layout == "raster":
            sources = plan.source[row][plan.source[row] >= 0]
            assert bool((sources.diff() > 0).all())
    landed = plan.merged_into >= 0
    if config.merge == "drop":
        assert int(plan.mass.sum()) == int(landed.sum())
        assert int(plan.mass.max()) <= 1
    else:
        assert torch.equal(landed, batch.mask), "every caller position is accounted for"
        assert torch.equal(plan.mass.sum(dim=1), batch.mask.sum(dim=1))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", NEEDS_NO_MODEL)
def test_images_of_any_size_anywhere(name, padding):
    batch = Batch([[3, (16,), 2], [4], [(7,), 1, (12,), (1,)], [(9,)]], padding, seed=2)
    config = NEEDS_NO_MODEL[name]
    plan = batch.plan(config)
    assert_is_naive(plan, batch, config)
    assert_consistent(plan, batch, config)


amounts = st.one_of(st.integers(0, 9), st.sampled_from([0.0, 1.0]), st.floats(0, 1))
parts = st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 10)))
batches = (
    st.lists(st.lists(parts, min_size=1, max_size=4), min_size=1, max_size=4)
    .filter(lambda rows: any(isinstance(part, tuple) for row in rows for part in row))
    .flatmap(
        lambda rows: st.builds(Batch, st.just(rows), st.sampled_from(["left", "right"]), st.integers(0, 9))
    )
)


@st.composite
def configs(draw, select=("similarity", "diversity", "norm", "uniform", "random")):
    values = {
        "retained": draw(amounts),
        "skipped": draw(amounts),
        "select": draw(st.sampled_from(select)),
        "merge": draw(st.sampled_from(["similarity", "pool", "drop"])),
        "summary_tokens": draw(st.integers(0, 3)),
        "skip_ffn": draw(st.booleans()),
        "skip_kv": draw(st.booleans()),
        "layout": draw(st.sampled_from(["raster", "grouped"])),
        "positions": draw(st.sampled_from(["original", "contiguous"])),
        "seed": draw(st.integers(0, 3)),
    }
    try:
        return SkipConfig(**values)
    except ConfigError:
        assume(False)


def check(batch, config):
    plan = batch.plan(config)
    # With retained=0 and skipped=0, a batch of images alone has no tokens left.
    assume(plan.roles.shape[1] > 0)
    assert_consistent(plan, batch, config)
    try:
        assert_is_naive(plan, batch, config)
    except naive.Ambiguous:
        assume(False)


@same_every_time
@given(batch=batches, config=configs())
def test_any_plan_is_the_naive_one(batch, config):
    check(batch, config)


@pytest.mark.slow
@always_new
@given(batch=batches, config=configs())
def test_many_more_plans_are_the_naive_ones(batch, config):
    check(batch, config)


def test_a_small_plan_written_out():
    """Two words, an image of six tokens (two retained, two skipped), one word; and a shorter row."""
    batch = Batch([[2, (6,), 1], [3]])
    plan = batch.plan(SkipConfig(retained=2, skipped=2, select="uniform", merge="pool"))
    text, kept, short, summary, pad = TokenRole
    assert plan.roles.tolist() == [
        [text, text, short, kept, short, kept, summary, summary, text],
        [pad, pad, pad, pad, pad, pad, text, text, text],
    ]
    assert plan.source.tolist()[0] == [0, 1, 2, 3, 5, 6, -1, -1, 8]
    assert plan.merged_into.tolist()[0] == [0, 1, 2, 3, 2, 4, 5, 4, 8]
    assert plan.position_source.tolist()[0] == [0, 1, 2, 3, 5, 6, 6, 5, 8]
    assert plan.removed.tolist() == [0, 0]
    assert plan.count(TokenRole.TEXT).tolist() == [3, 3]


def test_grouped_puts_each_group_before_its_summary():
    batch = Batch([[1, (6,), 1]])
    plan = batch.plan(SkipConfig(retained=2, skipped=2, select="uniform", merge="pool", layout="grouped"))
    text, kept, short, summary, _ = TokenRole
    assert plan.roles.tolist() == [[text, kept, kept, summary, short, short, summary, text]]
    assert plan.source.tolist() == [[0, 2, 5, -1, 1, 4, -1, 7]]


def test_a_plan_is_frozen():
    plan = Batch([[(4,)]]).plan(SkipConfig())
    with pytest.raises(AttributeError):
        plan.images = 7


@pytest.mark.parametrize(
    ("row", "sizes", "message"),
    [
        ([[0, 1, 1, 1, 1, 0]], [5], "4 image placeholders .* 5"),
        ([[0, 1, 1, 1, 1, 0]], [2, 1], "build input_ids and pixel_values"),
        ([[0, 1, 1], [1, 0, 0]], [3], "two rows"),
    ],
)
def test_images_that_do_not_fit_the_rows(row, sizes, message):
    with pytest.raises(InputError, match=message):
        Images.locate(torch.tensor(row).bool(), sizes)


def test_a_plans_repr_is_one_line():
    plan = Batch([[3, (16,), 4], [5]]).plan(SkipConfig(retained=5, skipped=4, summary_tokens=1))
    assert repr(plan) == (
        "TokenPlan(images=1, (2, 23) → (2, 18): TEXT=12, RETAINED=5, SKIPPED=4, SUMMARY=2, PADDING=13)"
    )


@pytest.mark.parametrize(
    "config",
    [
        *NEEDS_NO_MODEL.values(),
        SkipConfig(retained=64, skipped=64, select="diversity"),
        SkipConfig(retained=64, skipped=64, merge="tome"),
    ],
    ids=[*NEEDS_NO_MODEL, "64 + 64 by diversity", "64 + 64 by tome"],
)
def test_a_plan_is_the_same_under_autocast(config):
    """Training with autocast must choose the tokens that the engine, which has none, will choose."""
    batch = Batch([[3, (256,), 4], [(200,), 2]])
    batch.embeds = batch.embeds.float()
    plain = batch.plan(config)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = batch.plan(config)
    assert torch.equal(autocast.source, plain.source)
    assert torch.equal(autocast.merged_into, plain.merged_into)
