"""Simpler ways to spend as much, as configs of the same library: what Skip-Vision is to be measured against.

Each drops or merges visual tokens before the first layer; what is left takes the whole decoder and stays
in the KV cache. What the published methods of these names do besides, in the tower or between layers, is
not repeated here: docs/tradeoff.md says of each what it has in common with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PretrainedConfig

from skipvision.config import SkipConfig
from skipvision.cost.predict import Cost, predict_cost
from skipvision.errors import ConfigError

_drop = partial(SkipConfig, retained=1, skipped=0, merge="drop", summary_tokens=0)
_merge = partial(SkipConfig, summary_tokens=0, skip_ffn=False, skip_kv=False)

BASELINES: dict[str, SkipConfig] = {
    "random": _drop(select="random"),
    "uniform": _drop(select="uniform"),
    "downscaled": _merge(retained=0, skipped=1, merge="grid"),
    "fastv": _drop(select="attention", probe_layer=1),
    "visionzip": _merge(retained=5, skipped=1, select="vision_attention"),
    "divprune": _drop(select="diversity"),
    "norm": _drop(select="norm"),
    "tome": _merge(retained=0, skipped=1, merge="tome"),
    "skip-vision": SkipConfig(retained=100, skipped=156),
}
"""Of each method the shape: ``retained`` and ``skipped`` are shares of the tokens that are left."""


def of_size(shape: SkipConfig, tokens: int) -> SkipConfig:
    """A method with so many visual tokens left, shared out as its ``retained`` and ``skipped`` are."""
    retained = round(tokens * shape.retained / (shape.retained + shape.skipped))
    return shape.model_copy(update={"retained": retained, "skipped": tokens - retained})


def at_cost(
    model_config: PretrainedConfig,
    method: str | SkipConfig,
    fraction: float,
    *,
    images: int = 1,
    text_tokens: int = 64,
    visual_tokens: int | None = None,
) -> SkipConfig:
    """A method with as many visual tokens as a share of the full prefill FLOPs (`language_share`) allows.

    Args:
        model_config: the whole model's config.
        method: a name in `BASELINES`; or a SkipConfig, whose ``retained`` and ``skipped`` keep their ratio.
        fraction: of the full-token prefill FLOPs behind the vision tower; 0 … 1.
        images: images in the row.
        text_tokens: prompt tokens that are not visual.
        visual_tokens: as in `predict_cost`.

    Raises:
        ConfigError: no such method, or even its fewest tokens cost more.
    """
    if isinstance(method, str) and method not in BASELINES:
        raise ConfigError(f"no baseline {method!r}; there are {', '.join(BASELINES)}")
    shape = BASELINES[method] if isinstance(method, str) else method
    if not shape.retained + shape.skipped:
        raise ConfigError(f"retained={shape.retained} and skipped={shape.skipped} leave nothing to share out")
    predict = partial(
        predict_cost,
        model_config,
        images=images,
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
        new_tokens=1,
    )

    def ratio(tokens: int) -> float:
        return language_share(predict(of_size(shape, tokens)))

    everything = (predict(None).sequence - text_tokens) // max(images, 1)
    fewest = 1 + (shape.retained > 0 and shape.skipped > 0)
    if ratio(fewest) > fraction:
        named = repr(method) if isinstance(method, str) else f"select={shape.select!r}, merge={shape.merge!r}"
        raise ConfigError(
            f"{named} with {fewest} visual tokens costs {ratio(fewest):.1%} of the full prefill "
            f"behind the vision tower already: {fraction:.1%} cannot be had with this model"
        )
    return of_size(shape, _largest(fewest, everything, lambda tokens: ratio(tokens) <= fraction))


def language_share(cost: Cost) -> float:
    """Prefill FLOPs as a fraction of the full-token ones, the vision tower left out on both sides.

    No method here makes the tower cheaper. What reading its attention costs is planning, and counts.
    """
    full = cost.full or cost
    return (cost.prefill_flops - cost.vision_flops) / (full.prefill_flops - full.vision_flops)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all below it do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
