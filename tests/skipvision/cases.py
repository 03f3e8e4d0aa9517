"""The configurations and batches that many tests share.

An image of `tiny_llava` has 16 visual tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings

from skipvision import SkipConfig
from skipvision.testing.llava import IMAGE_TOKEN

CONFIGS = {
    "counts": SkipConfig(retained=5, skipped=4),
    "fractions": SkipConfig(retained=0.25, skipped=0.5),
    "no-summary": SkipConfig(retained=5, skipped=4, summary_tokens=0),
    "three-summaries": SkipConfig(retained=5, skipped=4, summary_tokens=3),
    "pool": SkipConfig(retained=3, skipped=5, merge="pool"),
    "drop": SkipConfig(retained=3, skipped=5, merge="drop"),
    "grouped": SkipConfig(retained=5, skipped=4, layout="grouped", summary_tokens=2),
    "contiguous": SkipConfig(retained=5, skipped=4, positions="contiguous"),
    "grouped-contiguous": SkipConfig(retained=5, skipped=4, layout="grouped", positions="contiguous"),
    "some-layers": SkipConfig(retained=5, skipped=4, skip_layers=[0, 2]),
    "drop-after": SkipConfig(retained=5, skipped=4, drop_after=0),
    "drop-later": SkipConfig(
        retained=4,
        skipped=4,
        summary_tokens=2,
        layout="grouped",
        positions="contiguous",
        skip_layers=[1],
        drop_after=1,
    ),
    "sized": SkipConfig(retained=5, skipped=4, size_bias=True),
    "sized-in-cache": SkipConfig(retained=6, skipped=0, size_bias=True, layout="grouped"),
    "sized-drop-later": SkipConfig(
        retained=3, skipped=4, merge="tome", skip_kv=False, drop_after=1, size_bias=True
    ),
    "ffn-for-all": SkipConfig(retained=5, skipped=4, skip_ffn=False),
    "cache-for-all": SkipConfig(retained=5, skipped=4, skip_kv=False),
    "retained-only": SkipConfig(retained=6, skipped=0),
    "skipped-only": SkipConfig(retained=0, skipped=6),
    "nothing-merged": SkipConfig(retained=0.5, skipped=0.5),
    "summaries-alone": SkipConfig(retained=16, skipped=0),
    "diversity": SkipConfig(retained=5, skipped=4, select="diversity"),
    "norm": SkipConfig(retained=5, skipped=4, select="norm"),
    "uniform": SkipConfig(retained=5, skipped=4, select="uniform"),
    "random": SkipConfig(retained=5, skipped=4, select="random", seed=3),
    "ffn-ratio": SkipConfig(retained=5, skipped=4, select="ffn_ratio"),
    "ffn-ratio-later": SkipConfig(retained=5, skipped=4, select="ffn_ratio", probe_layer=1),
    "attention": SkipConfig(retained=5, skipped=4, select="attention"),
    "attention-later": SkipConfig(retained=6, skipped=0, merge="drop", select="attention", probe_layer=1),
    "vision-attention": SkipConfig(retained=5, skipped=4, select="vision_attention"),
    "relevance": SkipConfig(retained=5, skipped=4, select="relevance"),
    "tome": SkipConfig(retained=3, skipped=5, merge="tome"),
    "tome-alone": SkipConfig(retained=0, skipped=6, merge="tome", skip_ffn=False, skip_kv=False),
    "grid": SkipConfig(retained=0, skipped=9, merge="grid", summary_tokens=0, skip_ffn=False, skip_kv=False),
}

BY_THE_MODEL = ("ffn_ratio", "attention", "vision_attention", "relevance")
"""Criteria that read more than features."""

same_every_time = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
"""Settings of random tests: the same examples in every run."""
always_new = settings(same_every_time, max_examples=2000, derandomize=False)
"""Settings of slow random tests: many new examples."""

ROWS = [[3, "image", 4], [5], ["image", 2, "image", 3]]
"""Rows with one image, none and two, of different lengths."""


def train_summary(summary: torch.nn.Module | None) -> None:
    """Give a summary layer weights that score every token differently, as after training."""
    if summary is not None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in summary.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality up to the order of float64 sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def labels_for(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return every real word of a batch as its own label, −100 at images and padding."""
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_TOKEN)
    return inputs["input_ids"].masked_fill(~words, -100)


def checkpoint_activations(model: Any, *, use_reentrant: bool) -> None:
    """Let a model run its layers again in the backward pass."""
    # The second is its name before transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
