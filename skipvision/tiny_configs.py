"""Configs of every image-text-to-text family, shrunk until a model of it is built in a blink."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING

LAYERS = 3
SIDE = 32
"""Pixels per side of the picture that towers with a fixed size take."""

SIZES: dict[str, Any] = {
    # width and depth
    "hidden_size": 64,
    "d_model": 64,
    "embed_dim": 64,
    "intermediate_size": 96,
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
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "sliding_window": 20,
    "sliding_window_size": 20,
    "attention_chunk_size": 20,
    # from tower to decoder
    "out_hidden_size": 64,
    "output_dim": 64,
    "projection_dim": 64,
    "projection_hidden_size": 64,
    "projection_hidden_dim": 64,
    "projection_intermediate_size": 96,
    "projector_hidden_size": 64,
    "alignment_intermediate_size": 96,
    "adapter_in_dim": 64,
    "adapter_out_dim": 64,
    "text_hidden_size": 64,
    "mm_hidden_size": 64,
    "mm_embed_dim": 64,
    "output_proj_dims": 64,
    "vision_hidden_size": 64,
    # pictures
    "image_size": SIDE,
    "patch_size": 8,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    "mm_posemb_size": 64,
    "max_img_size": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "share_expert_dim": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
"""Every size that any section of any config may have, and its tiny value."""

PAD, BOS, EOS = 0, 1, 2
FIRST_SPECIAL = 3
FIRST_MARK = 20
"""Ids of marks that processors put around placeholders and that no config names."""
FIRST_WORD = 32
"""Ids below are not words."""


def _rope(**options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **options}


def _mrope(*sections: int, **options: Any) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": _rope(mrope_section=list(sections), **options)}}


_FINE = {"vision_config": {"patch_size": 4}}
"""Families that merge four patches into a token."""
_VISION_TOKENS = {"vision_start_token_id": 18, "vision_end_token_id": 19}
"""Named by the checkpoints' configs, not by the class."""
_MINICPM = {"insert_layer_id": 1, "vision_config": {"insert_layer_id": 1}}
_SAM = {"patch_size": 2, "output_channels": 16, "global_attn_indexes": [1], "window_size": 4}
"""Towers that look through windows and then halve the resolution twice."""
_VQ = {"base_channels": 32, "latent_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1, 1, 1]}
_ANYRES = {
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": _FINE,
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "cohere2_vision": _FINE,
    "cosmos3_edge": _mrope(4, 2, 2),
    "cosmos3_omni": {**_mrope(4, 2, 2), "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _rope(mrope_section=[4, 2, 2])}},
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {"sam_config": {**_SAM, "downsample_channels": [16, 64]}},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {**_SAM, "patch_size": 8}},
    "chameleon": {
        "vocabulary_map": {"<image>": 3}
        | {f"IMGIMG{letter}Z": 10 + code for code, letter in enumerate("ABCDEFGHIJ")},
        "vq_config": {**_VQ, "num_embeddings": 10, "embed_dim": 32},
    },
    "dots3_note": {
        "text_config": {
            "num_key_value_heads": 4,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 16,
        },
        "audio_config": {"adapter_input_size": 64, "downsample_hidden_size": 16},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}
        | {f"<|visual token {code:06d}|>": 10 + code for code in range(10)},
        "vq_config": {
            **_VQ,
            "codebook_size": 10,
            "embed_dim": 4,
            "hidden_size": 32,
            "num_attention_heads": 1,
            "latent_channels": 4,
            "temporal_downsample_factor": 4,
        },
    },
    "ernie4_5_vl_moe": _mrope(3, 3, 2),
    "gemma3": {"mm_tokens_per_image": 16, "vision_config": {"patch_size": 4}},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        }
    },
    "gemma4": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "glm_ocr": _mrope(2, 3, 3),
    "glmga": _mrope(2, 3, 3),
    "glm46v": _mrope(2, 3, 3),
    "glm4v": _mrope(2, 3, 3),
    "glm4v_moe": _mrope(2, 1, 1, partial_rotary_factor=0.5),
    "got_ocr2": {"vision_config": _SAM},
    "granite4_vision": {
        **_ANYRES,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 2, 2],
    },
    "hunyuan_vl": {
        "text_config": {"head_dim": 16, "rope_parameters": _rope(mrope_section=[2, 2, 2, 2])},
        "vision_config": {"max_image_size": 64},
    },
    "idefics2": {
        "perceiver_config": {
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
        }
    },
    "idefics3": _FINE,
    "internvl": _FINE,
    "janus": {"vq_config": {**_VQ, "num_embeddings": 16}},
    "kimi_k25": {"text_config": {"num_key_value_heads": 4}},
    "inkling_mm_model": {
        "vision_config": {"num_hidden_layers": 4, "patch_size": 4},
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 16},
    },
    "llama4": {
        "text_config": {"intermediate_size_mlp": 96, "moe_layers": [1]},
        "vision_config": {
            "patch_size": 4,
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    },
    "llava": {"vision_feature_layer": -1},
    "llava_next": _ANYRES,
    "llava_next_video": _ANYRES,
    "llava_onevision": _ANYRES,
    "qwen2_5_vl": {
        **_mrope(4, 2, 2),
        "vision_config": {"window_size": 32, "fullatt_block_indexes": [1]},
    },
    "mistral_large4": {"text_config": {"kv_source_layers": [0, 1, 2], "num_key_value_heads": 4}},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [2, 1]},
        "vision_config": {"num_position_embeddings": 16},
    },
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {
        "out_hidden_size": 256,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    },
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "paddleocr_vl": _mrope(2, 3, 3),
    "pp_chart2table": {"vision_config": _SAM},
    "qianfan_ocr": _FINE,
    "qwen2_5_omni_thinker": {
        **_VISION_TOKENS,
        **_mrope(2, 3, 3),
        "vision_config": {"window_size": 32, "fullatt_block_indexes": [1]},
    },
    "qwen2_vl": _mrope(4, 2, 2),
    "qwen3_vl": {**_mrope(4, 2, 2), "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl_moe": {**_mrope(4, 2, 2), "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_omni_moe_thinker": {
        **_VISION_TOKENS,
        "audio_config": {"downsample_hidden_size": 16},
        **_mrope(4, 2, 2),
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
    },
    "shieldgemma2": {"mm_tokens_per_image": 16, "vision_config": {"patch_size": 4}},
    "step3p7": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _rope(), "full_attention": _rope()},
            "sliding_window": 20,
        },
        "vision_config": {"patch_size": 2},
    },
    "unlimited_ocr": {"vision_config": {"sam_config": {**_SAM, "downsample_channels": [16, 64]}}},
    "qwen3_5": _mrope(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True),
    "qwen3_5_moe": _mrope(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True),
    "qwen4_exp": {
        "text_config": {
            "hc_lowrank": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 2048,
            "indexer_compress_ratio": 4,
        }
    },
    "smolvlm": _FINE,
    "vipllava": {"vision_feature_layers": [-2, -1]},
}
"""What a family needs otherwise: fields of its config, sections as nested tables."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """The family's default config with tiny sizes and small token ids."""
    cls = CONFIG_MAPPING[model_type]
    return _shrink(cls, _special_tokens(cls), EXCEPTIONS.get(model_type, {}))


def _special_tokens(cls: type[PretrainedConfig]) -> dict[str, Any]:
    """A small id for each special token that the config names."""
    tokens: dict[str, Any] = {}
    next_id = FIRST_SPECIAL
    for field in dataclasses.fields(cls):
        if field.name.endswith(("_token_id", "_token_index")) and field.name not in ENDS:
            tokens[field.name] = next_id
            next_id += 1
        elif field.name.endswith("_token_ids") and isinstance(field.default, (list, tuple)):
            count = len(field.default)
            tokens[field.name] = list(range(next_id, next_id + count))
            next_id += count
    return tokens


ENDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def _shrink(
    cls: type[PretrainedConfig], options: Mapping[str, Any], exceptions: Mapping[str, Any]
) -> PretrainedConfig:
    config = cls(**options)
    full = {**vars(config), **{name: vars(config).get(held) for name, held in cls.attribute_map.items()}}
    names = {field.name for field in dataclasses.fields(cls)} | options.keys()
    tiny = {
        name: _like(full[name], size)
        for name, size in SIZES.items()
        if name in names and full.get(name) is not None
    }
    tiny |= {name: token for name, token in ENDS.items() if name in names}
    tiny |= {
        name: _first_two_kinds_and_last(value)
        for name, value in full.items()
        if name in names and isinstance(value, list) and len(value) == full.get("num_hidden_layers")
    }
    sections = {
        key: _shrink(_class(full[key], spec), spec.init_kwargs, exceptions.get(key, {}))
        for key, spec in cls.sub_configs_defaults.items()
        if full[key] is not None or key == "vision_config"
    }
    return cls(**{**options, **tiny, **exceptions, **sections})


def _class(section: PretrainedConfig | None, spec: Any) -> type[PretrainedConfig]:
    """A section's own class, or that of a section that may be left out."""
    return spec.config_class if section is None else type(section)


def _like(full: Any, size: Any) -> Any:
    """Sizes that a config keeps one a level stay so."""
    return type(full)([size] * len(full)) if isinstance(full, (list, tuple)) else size


def _first_two_kinds_and_last(layers: list[Any]) -> list[Any]:
    """What each of the layers is, for `LAYERS` = 3 of them."""
    other = next((kind for kind in layers if kind != layers[0]), layers[0])
    return [layers[0], other, layers[-1]]
