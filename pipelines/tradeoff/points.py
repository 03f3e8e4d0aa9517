"""The points of a trade-off: a method of one size under one adapter."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from transformers import PretrainedConfig

import skipvision as sv
from pipelines.data.chat import ChatFormat
from pipelines.data.rows import TrainingRow
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import load_config, load_processor
from pipelines.shared.console import say
from pipelines.tradeoff.config import (
    AS_TUNED,
    FULL,
    GRID,
    PIXELS,
    SKIP_VISION,
    AdapterSection,
    TradeoffConfig,
)
from pipelines.tradeoff.pixels import ImageSizes
from skipvision.baselines import BASELINES, at_cost
from skipvision.errors import ConfigError

_FIRST_FIELDS = (
    *(
        "retained",
        "skipped",
        "select",
        "merge",
        "summary_tokens",
        "skip_ffn",
        "skip_kv",
        "positions",
        "layout",
    ),
    *("probe_layer", "seed"),
)
"""The fields of SkipConfig when points were first named."""


@dataclass(frozen=True)
class Point:
    """A method of one size under one adapter.

    Attributes:
        adapter: label of the adapter.
        paths: the adapter's folder under each seed; None is the base model.
        method: name in the table.
        skip: the SkipConfig; None = full tokens.
        kept: retained and skipped tokens per image; None = all.
        budget: max share of the full prefill FLOPs; None = no limit.
        side: side in pixels to which images are resized; None = the model's own size.
    """

    adapter: str
    paths: tuple[str | None, ...]
    method: str
    skip: sv.SkipConfig | None
    kept: tuple[int, int] | None = None
    budget: float | None = None
    side: int | None = None

    def under(self, seed: int) -> sv.SkipConfig | None:
        """Return the SkipConfig for one seed: each seed draws another random pattern."""
        if self.skip is None or not self.skip.criterion.seeded:
            return self.skip
        return self.skip.model_copy(update={"seed": self.skip.seed + seed})

    def digest(self, evaluation: str, adapter: str | None, seed: int) -> str:
        """Name the answers under one seed, given digests of the evaluation and of the adapter."""
        skip = self.under(seed)
        named: list[Any] = [evaluation, adapter, None if skip is None else _named(skip)]
        named += [] if self.side is None else [self.side]
        return sha256(json.dumps(named).encode()).hexdigest()[:16]


SeededPoint = tuple[Point, int]
"""A point under one of its seeds."""


def points(config: TradeoffConfig, model: PretrainedConfig, text_tokens: int) -> Iterator[Point]:
    """Yield all points of a job. A method whose smallest size exceeds a budget is reported and left out."""
    visual = sv.predict_cost(model, None, text_tokens=text_tokens).sequence - text_tokens
    sizes = _image_sizes(config, model, text_tokens)
    for label, adapter in config.adapters.items():
        paths = (adapter.path, *adapter.other_seeds)
        for method, skip, budget in _methods(label, adapter, config, model, text_tokens, visual):
            seeds = paths[:1] if method == GRID else paths  # one seed is enough to draw curves
            kept = None if skip is None else skip.counts(visual)[:2]
            yield Point(label, seeds, method, skip, kept, budget)
        if sizes is not None:
            yield from _smaller_images(label, adapter, config, model, sizes)


def _methods(
    label: str,
    adapter: AdapterSection,
    config: TradeoffConfig,
    model: PretrainedConfig,
    text_tokens: int,
    visual: int,
) -> Iterator[tuple[str, sv.SkipConfig | None, float | None]]:
    """Yield (method, SkipConfig, budget) of one adapter's points."""
    shapes = {**BASELINES, SKIP_VISION: skip_vision_shape(adapter)}
    yield FULL, None, None
    if trained := _trained_skip(adapter):
        retained, skipped, _ = trained.counts(visual)
        yield AS_TUNED, trained.model_copy(update={"retained": retained, "skipped": skipped}), None
    for method, fraction in config.budgets:
        if method == PIXELS:
            continue
        try:
            skip = at_cost(model, shapes[method], fraction, text_tokens=text_tokens)
        except ConfigError as error:
            say(f"{label}, {method}: {error}")
            continue
        yield method, skip, fraction
    for retained in config.grid.retained:
        for skipped in config.grid.skipped:
            counts = {"retained": retained, "skipped": skipped}
            yield GRID, shapes[SKIP_VISION].model_copy(update=counts), None


def _image_sizes(config: TradeoffConfig, model: PretrainedConfig, text_tokens: int) -> ImageSizes | None:
    """Return the sizes of smaller images; None without such points, or if the model cannot read them."""
    if not config.pixel_fractions:
        return None
    try:
        sizes = ImageSizes(model, text_tokens)
    except ConfigError as error:
        if config.pixel_sides or (config.difficult and config.difficult.method == PIXELS):
            raise
        say(f"left out: {error}")
        return None
    for side in config.pixel_sides:
        sizes.check(side)
    return sizes


def _smaller_images(
    label: str, adapter: AdapterSection, config: TradeoffConfig, model: PretrainedConfig, sizes: ImageSizes
) -> Iterator[Point]:
    """Yield the points of smaller images under an adapter: at each budget, and the further sizes."""
    paths = (adapter.path, *adapter.other_seeds)

    def point(method: str, side: int, budget: float | None) -> Point:
        return Point(label, paths, method, None, (sizes.tokens(side), 0), budget, side)

    for fraction in config.pixel_fractions:
        shape, rival = skip_vision_shape(adapter), None
        with suppress(ConfigError):  # its smallest size may cost more
            rival = at_cost(model, shape, fraction, text_tokens=sizes.text_tokens)
        for method, side in sizes.within(fraction, rival):
            yield point(method, side, fraction)
    for side in config.pixel_sides:
        yield point(PIXELS, side, None)


def _named(skip: sv.SkipConfig) -> dict[str, Any]:
    """Return the fields that name a SkipConfig: a later field only if it is set, so that names last."""
    fields = sv.SkipConfig.model_fields
    return {
        name: value
        for name, value in skip.model_dump().items()
        if name in _FIRST_FIELDS or value != fields[name].default
    }


def skip_vision_shape(adapter: AdapterSection) -> sv.SkipConfig:
    """Return the SkipConfig whose ratio and criteria Skip-Vision has under an adapter."""
    return adapter.skip or _trained_skip(adapter) or BASELINES[SKIP_VISION]


def _trained_skip(adapter: AdapterSection) -> sv.SkipConfig | None:
    skip: sv.SkipConfig | None = None if adapter.path is None else sv.read_adapter(adapter.path)["skip"]
    return skip


def model_config(model: BaseModelSection) -> PretrainedConfig:
    """Load the config of the base model. Raise `ConfigError` if that is not possible."""
    return load_config(model.path)


def mean_text_tokens(model: BaseModelSection, rows: Sequence[TrainingRow]) -> int:
    """Return the mean number of prompt tokens that are not visual."""
    chat = ChatFormat(load_processor(model.path))
    prompts = [chat.prompt(row.messages[:-1]) for row in rows]
    lengths = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    # The rendered text holds one placeholder per image.
    return round(statistics.mean(lengths) - statistics.mean(len(row.images) for row in rows))
