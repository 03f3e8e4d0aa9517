"""The folder that all engines read: a model with random weights, and images."""

from __future__ import annotations

import random
import string
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import skipvision as sv
from benchmarks import _measure
from benchmarks._measure import Geometry

WORDS = 32
"""Tokens of a prompt's text."""
IMAGE = "<image>"


def write_workload(
    folder: Path, geometry: Geometry, dtype: torch.dtype, config: sv.SkipConfig, images: int
) -> Path:
    """Write an exported model with random weights, and images; returns the folder."""
    base = folder / "base"
    model = _measure.build(geometry, torch.device("cpu"), dtype)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    model.save_pretrained(base)  # type: ignore[operator]
    write_processor(base, geometry)
    sv.export(base, None, folder / "model", config=config)
    write_images(folder, geometry, images)
    return folder


def write_images(folder: Path, geometry: Geometry, count: int) -> None:
    """Write images of random pixels: 000.png, 001.png …"""
    (folder / "images").mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (geometry.image, geometry.image, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")


def prompt(number: int) -> str:
    """Return a prompt with one image and `WORDS` tokens of text."""
    return IMAGE + "".join(random.Random(number).choices(string.ascii_uppercase, k=WORDS))


def write_processor(folder: Path, geometry: Geometry) -> None:
    """Write the tokenizer and the image processor of a LLaVA of this geometry."""
    side = {"height": geometry.image, "width": geometry.image}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": geometry.image}, crop_size=side),
        tokenizer=_tokenizer(geometry.vocabulary),
        patch_size=geometry.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with this many tokens, each of which has a text.

    Upper-case letters are tokens of their own, and the tokens beyond single bytes are strings of lower-case
    letters. The last token is the image's placeholder. No token ends an answer.
    """
    tokens = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pairs = [(one, other) for one in string.ascii_lowercase for other in string.ascii_lowercase]
    words = ["".join(pair) for pair in pairs]
    merges = [*pairs, *((one, other) for one in words for other in words)][: vocabulary - len(tokens) - 1]
    tokens += ["".join(parts) for parts in merges]
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=8192,
    )
