"""Tiny random models of vLLM's families, in folders with processors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pipelines.shapes.base.parts import build_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Tiny:
    """A family: how it is built, the text that stands where an image is, and how vLLM runs it."""

    build: Any
    image: str
    implementation: str = "auto"


def tokenizer(*tokens: str, **named: str) -> Any:
    """A tokenizer with further special tokens, and those that a processor looks up by name."""
    built = build_tokenizer(0, vocabulary=320)
    built.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=named or {"image_token": "<image>"},
        padding_side="left",
    )


def save(tiny: Tiny, folder: Path) -> Path:
    """Write a model with random weights that matter, and its processor."""
    model, processor = tiny.build()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel() if weight.ndim > 3 else weight.shape[-1]
                weight.normal_(0, 0.6 / math.sqrt(fan_in))
    ends = {
        "pad_token_id": processor.tokenizer.pad_token_id,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def model_of(config: Any) -> Any:
    torch.manual_seed(1)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def llava_next() -> tuple[Any, Any]:
    words = tokenizer()
    vision = transformers.CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=64)
    text = transformers.LlamaConfig(**TEXT, vocab_size=len(words), **ends(words))
    config = transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        tie_word_embeddings=False,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return model_of(config), processor


def vipllava() -> tuple[Any, Any]:
    words = tokenizer()
    vision = transformers.CLIPVisionConfig(**VISION, image_size=56, patch_size=14, projection_dim=64)
    text = transformers.LlamaConfig(**TEXT, vocab_size=len(words), **ends(words))
    config = transformers.VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -1],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = transformers.LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return model_of(config), processor


def video_llama_3() -> tuple[Any, Any]:
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    image, video = words.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    vision = transformers.VideoLlama3VisionConfig(**VISION, patch_size=14)
    text = transformers.Qwen2Config(**TEXT, vocab_size=len(words), **ends(words))
    config = transformers.VideoLlama3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
        VideoLlama3ImageProcessorPil,
    )
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    images = VideoLlama3ImageProcessorPil(size=size)
    return model_of(config), transformers.VideoLlama3Processor(
        images, words, VideoLlama3VideoProcessor(size=size)
    )


def aya_vision() -> tuple[Any, Any]:
    marks = {
        "start_image_token": "<|START_OF_IMG|>",
        "end_image_token": "<|END_OF_IMG|>",
        "patch_token": "<|IMG_PATCH|>",
    }
    words = tokenizer("<image>", **marks)
    vision = transformers.SiglipVisionConfig(
        **VISION,
        image_size=32,
        patch_size=4,
        vision_use_head=False,  # not for vLLM on CPUs
    )
    text = transformers.Cohere2Config(
        **TEXT,
        vocab_size=len(words),
        layer_types=["full_attention"] * 3,
        logit_scale=1.0,
        **ends(words),
    )
    config = transformers.AyaVisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
        tie_word_embeddings=False,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": 32, "width": 32}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    return model_of(config), transformers.AyaVisionProcessor(
        images, words, patch_size=4, img_size=32, downsample_factor=2
    )


def internvl() -> tuple[Any, Any]:
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(**marks)
    vision = transformers.InternVLVisionConfig(
        **VISION, image_size=[32, 32], patch_size=[4, 4], use_qk_norm=False
    )
    text = transformers.Qwen2Config(**TEXT, vocab_size=len(words), **ends(words))
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    size = {"height": 32, "width": 32}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = transformers.InternVLProcessor(
        images, words, InternVLVideoProcessor(size=size), image_seq_length=16
    )
    return model_of(config), processor


def qwen(model_type: str) -> tuple[Any, Any]:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*marks[:2], image_token=marks[2], video_token=marks[3])
    start, end, image, video = words.convert_tokens_to_ids(list(marks))
    rope = MROPE | ({"mrope_interleaved": True} if model_type == "qwen3_vl" else {})
    text = {**TEXT, "vocab_size": len(words), "rope_parameters": rope, **ends(words)}
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
    }
    ids = {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": False,
    }
    size = {"shortest_edge": 56 * 56, "longest_edge": 168 * 168}
    if model_type == "qwen2_5_vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config={**vision, "fullatt_block_indexes": [1], "window_size": 56}, **ids
        )
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        videos = transformers.Qwen2VLVideoProcessor(size=size)
        kind = transformers.Qwen2_5_VLProcessor
    else:
        config = transformers.Qwen3VLConfig(
            text_config=text,
            vision_config={**vision, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
            **ids,
        )
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        videos = transformers.Qwen3VLVideoProcessor(size=size)
        kind = transformers.Qwen3VLProcessor
    images = Qwen2VLImageProcessorPil(size=size, patch_size=14)
    return model_of(config), kind(images, words, videos)


def ends(words: Any) -> dict[str, int]:
    return {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
FAMILIES = {
    "llava_next": Tiny(llava_next, "<image>"),
    "internvl": Tiny(internvl, "<IMG_CONTEXT>"),
    "qwen2_5_vl": Tiny(lambda: qwen("qwen2_5_vl"), _QWEN),
    "qwen3_vl": Tiny(lambda: qwen("qwen3_vl"), _QWEN),
    "vipllava": Tiny(vipllava, "<image>"),
    "video_llama_3": Tiny(video_llama_3, "<|image_pad|>"),
    "llava_next of transformers": Tiny(llava_next, "<image>", "transformers"),
    "internvl of transformers": Tiny(internvl, "<IMG_CONTEXT>", "transformers"),
}
UNPRUNED = {
    "aya_vision": Tiny(aya_vision, "<image>", "transformers"),
    "qwen2_5_vl": Tiny(lambda: qwen("qwen2_5_vl"), _QWEN, "transformers"),
}
"""Families that vLLM's Transformers backend runs with full tokens only."""
