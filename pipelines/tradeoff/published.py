"""The published points of the paper, and its two models as configs without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables; ``flops`` is the ratio of inference FLOPs to full tokens."""

    decoder: str
    tokens: int
    retained: int
    skipped: int
    flops: float | None


PUBLISHED = (
    Published("LLaMA-3-8B", 576, 100, 156, 0.25),
    Published("LLaMA-3-8B", 576, 256, 320, 0.60),
    Published("LLaMA-3-8B", 1296, 272, 256, 0.25),
    Published("Vicuna-1.5-7B", 576, 64, 156, None),
)
"""Skip-Vision, ICCV 2025, arXiv 2503.21817."""

_DECODERS: dict[str, dict[str, Any]] = {
    "LLaMA-3-8B": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    "Vicuna-1.5-7B": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
}


def llava_with(decoder: str) -> LlavaConfig:
    """Return LLaVA-1.5's config, with CLIP-L/14 at 336 pixels as tower and a decoder of `PUBLISHED`."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **_DECODERS[decoder])
    return LlavaConfig(vision_config=vision, text_config=text, image_seq_length=576)
