"""Configs of every image-text-to-text family, shrunk so that models are built in milliseconds."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from skipvision._compat import config_sections
from skipvision.anatomy.pictures import SIDE

LAYERS = 3

SIZES: dict[str, Any] = {
    # width and depth
    "hidden_size": 64,
    "d_model": 64,
    "embed_dim": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "mlp_dim": 96,
    "num_hidden_layers": LAYERS,
    "encoder_layers": LAYERS,
    "depth": LAYERS,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "hc_lowrank": 16,
    "max_position_embeddings": 2048,
    # attention
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_sliding_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    # With few heads many scores are 0, and which of them are among the best is arbitrary.
    "index_n_heads": 16,
    "index_topk": 24,
    "sliding_window": 20,
    "sliding_window_size": 20,
    "attention_chunk_size": 20,
    # recurrence instead of attention
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_hidden_size": 64,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "share_expert_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # towers
    "image_size": SIDE,
    "max_image_size": 2 * SIDE,
    "max_img_size": 2 * SIDE,
    "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
    "patch_size": 8,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    "mm_posemb_size": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "window_size": SIDE,
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "insert_layer_id": 1,
    # towers with a codebook
    "base_channels": 32,
    "latent_channels": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "num_embeddings": 10,
    "codebook_size": 10,
    # audio towers
    "n_mel_bins": 4,
    "mel_vocab_size": 16,
    "downsample_hidden_size": 16,
    # from tower to decoder
    "mm_tokens_per_image": 16,
    "out_hidden_size": 64,
    "output_channels": 16,
    "output_dim": 64,
    "output_proj_dims": 64,
    "vision_output_dim": 64,
    "vision_hidden_size": 64,
    "text_hidden_size": 64,
    "mm_hidden_size": 64,
    "mm_embed_dim": 64,
    "adapter_in_dim": 64,
    "adapter_input_size": 64,
    "adapter_out_dim": 64,
    "alignment_intermediate_size": 96,
    "projection_dim": 64,
    "projection_hidden_dim": 64,
    "projection_hidden_size": 64,
    "projection_intermediate_size": 96,
    "projector_hidden_size": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "resampler_n_latents": 8,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 16,
}
"""Tiny values of the sizes that the sections of configs have."""

PAD, BOS, EOS = 0, 1, 2
FIRST_SPECIAL = 3
"""First id of the special tokens that a config names."""
FIRST_CODE = 20
"""First id of the image codes, in families whose towers have a codebook."""
FIRST_MARK = 30
"""First id of the marks that processors put around placeholders but no config names."""
FIRST_WORD = 40
"""First id of ordinary words."""

_ENDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_CODES = range(FIRST_CODE, FIRST_CODE + 10)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_ALL_HEADS_CACHED = {"text.num_key_value_heads": 4}
_MROPE = {"text.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}}
_MROPE_OF_HALF = {"text.rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
_FOUR_PATCHES_A_TOKEN = {"vision.patch_size": 4}
_SIXTEEN_PATCHES_A_TOKEN = {"vision.patch_size": 2}
# Before transformers 5.18 no image has more patches than this.
_LARGE_IMAGES = {"vision.image_size": 4 * SIDE}
_WINDOWED = {"vision.patch_size": 2, "vision.window_size": 4}
_WINDOWED_THEN_ENCODED = {
    "vision.sam.patch_size": 2,
    "vision.sam.window_size": 4,
    "vision.sam.downsample_channels": [16, 64],
}
# In the configs of checkpoints, but not defaults of the class.
_VISION_ENDS = {"vision_start_token_id": FIRST_CODE, "vision_end_token_id": FIRST_CODE + 1}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "aya_vision": _FOUR_PATCHES_A_TOKEN,
    "chameleon": {
        "vocabulary_map": {
            "<image>": FIRST_SPECIAL,
            **{f"IMGIMG{letter}Z": code for letter, code in zip("ABCDEFGHIJ", _CODES, strict=True)},
        },
        "vq.embed_dim": 32,
    },
    "cohere2_vision": _FOUR_PATCHES_A_TOKEN,
    "cohere_compass": {
        "text.rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [3, 3, 2]}},
    },
    "cosmos3_edge": _MROPE,
    "cosmos3_omni": _MROPE,
    "deepseek_ocr2": _WINDOWED_THEN_ENCODED
    | {"text.mlp_layer_types": ["dense", "sparse", "sparse"], "text.num_experts_per_tok": 2},
    "deepseek_vl_hybrid": {"high_res_vision.window_size": 4},
    "dots3_note": _ALL_HEADS_CACHED
    | {
        "text.swa_num_attention_heads": 4,
        "text.swa_num_key_value_heads": 4,
        "text.swa_q_lora_rank": 16,
        "text.swa_kv_lora_rank": 16,
        "text.swa_head_dim": 16,
        "text.swa_qk_nope_head_dim": 8,
        "text.swa_v_head_dim": 16,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": FIRST_SPECIAL,
            "<|extra_200|>": FIRST_SPECIAL + 1,
            **{f"<|visual token {number:06d}|>": code for number, code in enumerate(_CODES)},
        },
        "vq.temporal_downsample_factor": 1,
        "vq.hidden_size": 32,
        "vq.num_attention_heads": 1,
    },
    "ernie4_5_vl_moe": _MROPE,
    "fast_vlm": {
        "image_seq_length": 16,
        "vision.model_args": {
            "inference_mode": True,
            "layers": [1, 1, 1, 1, 1],
            "embed_dims": [16, 16, 32, 32, 32],
        },
    },
    "gemma3": _FOUR_PATCHES_A_TOKEN,
    # As in its checkpoints, its last layers read another layer's keys and values.
    "gemma3n": {"text.num_kv_shared_layers": 1, "vision.hidden_size": 2048},  # as of timm's tower
    "gemma4": {"text.global_head_dim": 32},
    "gemma4_unified": {"text.global_head_dim": 32},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": _MROPE_OF_HALF,
    # Its pools of tokens are others after a reduction: all of them are selected.
    "glm5_next": _ALL_HEADS_CACHED | {"text.qk_rope_head_dim": 0, "text.index_topk": 2048},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "got_ocr2": _WINDOWED,
    "granite4_vision": {
        # As in its checkpoints; the defaults of transformers before 5.20 differ.
        "text.model_type": "granite4_vision_text",
        "qformer.encoder_hidden_size": 64,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
    },
    "granite_docling": _FOUR_PATCHES_A_TOKEN | {"vision.scale_factor": 2},
    "hunyuan_vl": {"text.head_dim": 16, "text.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "idefics3": _FOUR_PATCHES_A_TOKEN,
    "inkling_mm_model": {"vision.patch_size": 2},
    "internvl": _FOUR_PATCHES_A_TOKEN,
    "kimi_k25": _ALL_HEADS_CACHED,
    # As in its checkpoints; the default of the class differs.
    "lfm2_vl": {"text.layer_types": ["conv", "conv", "full_attention"]},
    "llama4": _FOUR_PATCHES_A_TOKEN | {"text.moe_layers": [1], "vision.intermediate_size": 256},
    "lighton_ocr": _LARGE_IMAGES,
    # As in its checkpoints; the default of the class differs.
    "minimax_m3_vl": {
        "text.layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "text.index_n_heads": 2,
        # Its blocks of tokens are others after a reduction: all of them are selected.
        "text.index_block_size": 8,
        "text.index_topk_blocks": 256,
    },
    "mistral3": _LARGE_IMAGES,
    # Its second layer reads the keys and values of the first.
    "mistral_large4": _ALL_HEADS_CACHED
    | {"text.kv_source_layers": [0, 0, 2], "text.no_rope_layers": [1, 1, 0]},
    "molmo2": {"adapter.vision_feature_layer": [2, 1], "vision.num_position_embeddings": 16},
    "nemotron_h_omni": {"text.layer_types": ["linear_attention", "moe", "full_attention", "mlp"]},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {
        "out_hidden_size": 256,
        "audio.num_hidden_layers": 4,
        "audio.hidden_sizes": [16] * 4,
        "audio.depths": [1] * 4,
    },
    "paddleocr_vl": _MROPE,
    "perception_lm": {
        "vision.architecture": "vit_pe_lang_large_patch14_448",
        "vision.model_args": {
            "embed_dim": 64,
            "depth": LAYERS,
            "num_heads": 4,
            "patch_size": 8,
            "img_size": [SIDE, SIDE],
            "ref_feat_shape": [SIDE // 8, SIDE // 8],
            "global_pool": "",
        },
    },
    "pp_chart2table": _WINDOWED,
    "qianfan_ocr": _FOUR_PATCHES_A_TOKEN,
    "qwen2_5_omni_thinker": _MROPE | _VISION_ENDS,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_5": _MROPE_OF_HALF,
    "qwen3_5_moe": _MROPE_OF_HALF,
    "qwen3_omni_moe_thinker": _MROPE | _VISION_ENDS,
    "qwen3_vl": _MROPE,
    "qwen3_vl_moe": _MROPE,
    "qwen4_exp": _MROPE_OF_HALF
    | {
        "text.indexer_n_heads": 2,
        "text.indexer_kv_heads": 1,
        "text.indexer_head_dim": 16,
        "text.indexer_budget": 2048,
        "text.indexer_compress_ratio": 4,
    },
    "shieldgemma2": _FOUR_PATCHES_A_TOKEN,
    "smolvlm": _FOUR_PATCHES_A_TOKEN,
    "step3p7": _SIXTEEN_PATCHES_A_TOKEN
    | {
        "text.layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "text.rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        "text.sliding_window": 20,
    },
    "unlimited_ocr": _WINDOWED_THEN_ENCODED | _ALL_HEADS_CACHED,
    "vipllava": {"vision_feature_layers": [-2, -1]},
}
"""Fields that differ from `SIZES` in a family; ``vision.patch_size`` is a field of its ``vision_config``."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return the family's default config with tiny sizes and small token ids."""
    cls = CONFIG_MAPPING[model_type]
    return _shrink(cls, _special_tokens(cls), EXCEPTIONS.get(model_type, {}))


def _special_tokens(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """Assign a small id to each special token that the config names."""
    unused = itertools.count(FIRST_SPECIAL)
    tokens: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name.endswith("_token_ids") and isinstance(field.default, (list, tuple)):
            tokens[field.name] = [next(unused) for _ in field.default]
        elif re.search("_token_(id|index)$|^image_patch_id$", field.name) and field.name not in _ENDS:
            tokens[field.name] = next(unused)
    return tokens


def _shrink(
    cls: type[PretrainedConfig], options: Mapping[str, Any], exceptions: Mapping[str, Any]
) -> PretrainedConfig:
    """Build a section of a config with tiny sizes, and its subsections.

    A ``model_type`` among the exceptions replaces the class.

    Args:
        cls: class of the section.
        options: arguments that the parent section passes to it.
        exceptions: fields that differ from `SIZES`.
    """
    cls = CONFIG_MAPPING[exceptions["model_type"]] if "model_type" in exceptions else cls
    defaults = vars(cls(**options))
    full = defaults | {name: defaults.get(other) for name, other in cls.attribute_map.items()}
    names = {field.name for field in dataclasses.fields(cls)} | options.keys()
    tiny = {
        name: _like(full[name], size)
        for name, size in SIZES.items()
        if name in names and full.get(name) is not None
    }
    ends = {name: token for name, token in _ENDS.items() if name in names}
    layers = {
        name: _first_two_kinds_and_last(value)
        for name, value in full.items()
        if name in names and isinstance(value, list) and len(value) == full.get("num_hidden_layers")
    }
    own = {name: value for name, value in exceptions.items() if "." not in name and name != "model_type"}
    sections = {
        name: _shrink(section.cls, section.options, _within(name, exceptions))
        for name, section in config_sections(cls, full, always="vision_config").items()
    }
    return cls(**{**options, **tiny, **ends, **layers, **own, **sections})


def _within(section: str, exceptions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the exceptions of this section."""
    start = section.removesuffix("_config") + "."
    return {name.removeprefix(start): value for name, value in exceptions.items() if name.startswith(start)}


def _like(full: Any, size: Any) -> Any:
    """Return the size, or a list of it where the config has a list with one value for each level."""
    if not isinstance(full, (list, tuple)):
        return size
    return type(full)(size if isinstance(size, list) else [size] * len(full))


def _first_two_kinds_and_last(layers: list[Any]) -> list[Any]:
    """Reduce a list of layer kinds to `LAYERS` = 3."""
    other = next((kind for kind in layers if kind != layers[0]), layers[0])
    return [layers[0], other, layers[-1]]
