"""A tiny random LLaVA and inputs for it, built in process: for tests, examples and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.auto import AutoConfig

from skipvision.loading import build_model

IMAGE_TOKEN = 5
"""Placeholder token id of `tiny_llava`."""


def tiny_llava(
    *,
    text: str = "llama",
    dtype: torch.dtype = torch.float32,
    side: int = 4,
    seed: int = 0,
    attention: str = "sdpa",
    **text_options: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, in eval mode.

    Args:
        text: model_type of the decoder ("llama", "qwen2", "mistral" …).
        dtype: dtype of all weights.
        side: patches per side; an image has side² visual tokens.
        seed: seed of the weights.
        attention: attention implementation of transformers.
        text_options: fields of the decoder's config that differ from the tiny default.
    """
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * side,
        patch_size=4,
        projection_dim=16,
    )
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(text, **{**options, **text_options}),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=side**2,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlavaForConditionalGeneration = build_model(config, attn_implementation=attention)
        # With Hugging Face's small initial weights FFN updates are negligible and no test could see them.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.6 / parameter.shape[-1] ** 0.5)
    # Random weights would sometimes generate "<image>".
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    model.eval().to(dtype=dtype)
    return model


def tiny_inputs(
    rows: list[list[int | str]],
    *,
    side: int = 4,
    padding: str = "left",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs of `tiny_llava`: each row a list of token counts (text) and ``"image"``.

    ``[[3, "image", 4], [5]]`` is a row of three words, an image and four words, and a row of five words.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T); ``pixel_values`` (I, 3, 4 · side, 4 · side) if
        there are images. Words are random ids without special tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lines, images = [], 0
    for row in rows:
        ids: list[int] = []
        for part in row:
            if part == "image":
                ids += [IMAGE_TOKEN] * side**2
                images += 1
            else:
                ids += torch.randint(6, 64, (int(part),), generator=generator).tolist()
        lines.append(torch.tensor(ids))
    inputs = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(lines, True, 0, padding_side=padding),
        "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(line), dtype=torch.long) for line in lines], True, 0, padding_side=padding
        ),
    }
    if images:
        shape = (images, 3, 4 * side, 4 * side)
        inputs["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return inputs
