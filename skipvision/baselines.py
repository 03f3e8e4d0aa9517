"""Baselines for Skip-Vision at equal cost, each a `SkipConfig`.

A baseline drops or merges visual tokens before the first layer; the remaining ones take the whole decoder and
stay in the KV cache. Published methods of these names also work in the tower or between layers, which the
baselines do not: docs/tradeoff.md lists what each has in common with its namesake.
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
"""The shape of each method: ``retained`` and ``skipped`` are relative shares of the remaining tokens."""


def of_size(shape: SkipConfig, tokens: int) -> SkipConfig:
    """Return a method that keeps ``tokens`` visual tokens, divided as its ``retained`` and ``skipped``."""
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
    """Return a method with as many visual tokens as a share of the full prefill FLOPs allows.

    Args:
        model_config: the whole model's config.
        method: a name in `BASELINES`; or a SkipConfig, whose ``retained`` and ``skipped`` keep their ratio.
        fraction: share (0–1) of the full-token prefill FLOPs, without the vision tower; see `language_share`.
        images: images in the row.
        text_tokens: prompt tokens that are not visual.
        visual_tokens: as in `predict_cost`.

    Raises:
        ConfigError: there is no such method, or its smallest number of tokens costs more.
    """
    if isinstance(method, str) and method not in BASELINES:
        raise ConfigError(f"no baseline {method!r}; choose one of {', '.join(BASELINES)}")
    shape = BASELINES[method] if isinstance(method, str) else method
    if not shape.retained + shape.skipped:
        raise ConfigError(
            f"retained={shape.retained} and skipped={shape.skipped} leave no tokens: raise one of them"
        )
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
            f"{named} with {fewest} visual tokens costs {ratio(fewest):.1%} of the full prefill after the "
            f"vision tower: {fraction:.1%} is too little for this model, use a larger fraction"
        )
    return of_size(shape, _largest(fewest, everything, lambda tokens: ratio(tokens) <= fraction))


def language_share(cost: Cost) -> float:
    """Return prefill FLOPs as a fraction of the full-token ones, both without the vision tower.

    No method here makes the tower cheaper. Reading its attention is planning, and counts.
    """
    full = cost.full or cost
    return (cost.prefill_flops - cost.vision_flops) / (full.prefill_flops - full.vision_flops)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits; all smaller ones must fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
