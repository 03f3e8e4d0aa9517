"""Retained tokens that cost as much as retained and skipped ones together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PretrainedConfig

from skipvision.baselines import at_cost, language_share
from skipvision.config import SkipConfig
from skipvision.cost.predict import predict_cost
from skipvision.errors import SkipVisionError


@dataclass(frozen=True)
class _Model:
    """A model's config, as the key of a cache."""

    text: str
    config: PretrainedConfig = field(compare=False)


def without_skipped(config: SkipConfig, model: PretrainedConfig) -> SkipConfig | None:
    """Return a configuration without skipped tokens that costs no more FLOPs; None if that is unknown.

    Both prefill one image of the model's own size. A merge that only makes skipped tokens becomes
    "similarity". The first call for a model measures its parts, which takes seconds.
    """
    merge = "similarity" if config.merging.check(config.merge, 1, 0) else config.merge
    plain = SkipConfig(**{**config.model_dump(), "retained": 1, "skipped": 0, "merge": merge})
    retained = _retained(config, plain, _Model(model.to_json_string(use_diff=False), model))
    return None if retained is None else SkipConfig(**{**plain.model_dump(), "retained": retained})


@lru_cache(maxsize=256)
def _retained(config: SkipConfig, plain: SkipConfig, model: _Model) -> int | None:
    try:
        share = language_share(predict_cost(model.config, config, training=False))
        return int(at_cost(model.config, plain, share).retained)
    except SkipVisionError:
        return None
