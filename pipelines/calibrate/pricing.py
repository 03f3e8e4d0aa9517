"""The predicted costs of a SkipConfig on a user's data, as ratios to full tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from transformers import PretrainedConfig

import skipvision as sv
from pipelines.data.rows import ImageSource, Message
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from skipvision.config import SkipConfig

_SAMPLE = 100
"""Rows whose lengths are averaged."""


class Row(Protocol):
    """A prompt: a row or a question."""

    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def images(self) -> Sequence[ImageSource]: ...


@dataclass(frozen=True)
class Pricing:
    """Predicts the costs of configs for an average row.

    Attributes:
        config: of the base model.
        images: images of a row.
        text_tokens: text tokens of a row.
    """

    config: PretrainedConfig
    images: int
    text_tokens: int
    _known: dict[SkipConfig, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: EngineModel, config: PretrainedConfig, rows: Sequence[Row]) -> Self:
        """Average the rows' numbers of images and text tokens."""
        processor: Any = load_processor(model.base)
        sample = rows[:_SAMPLE]
        text = sum(len(processor.tokenizer(m.text)["input_ids"]) for one in sample for m in one.messages)
        images = sum(len(one.images) for one in sample) / len(sample)
        return cls(config, max(1, round(images)), max(1, text // len(sample)))

    def costs(self, skip: SkipConfig) -> dict[str, float]:
        """Return the ratios to full tokens, by name."""
        if skip not in self._known:
            cost = sv.predict_cost(
                self.config, skip, images=self.images, text_tokens=self.text_tokens, training=False
            )
            ratio = cost.ratio_to_full
            self._known[skip] = {"prefill_flops": ratio.prefill_flops, "kv_bytes": ratio.kv_bytes}
        return self._known[skip]

    @staticmethod
    def name(skip: SkipConfig) -> str:
        """Return a digest of a config's values."""
        return hashlib.sha256(skip.model_dump_json().encode()).hexdigest()[:8]
