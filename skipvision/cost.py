"""What a configuration will cost, predicted from configs alone: FLOPs and KV bytes.

A FLOP count is two per multiply-add of matrix products and convolutions, as
``torch.utils.flop_counter`` counts; attention is counted over the full square of the sequence, its
backward as twice its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PretrainedConfig
from transformers.models.auto import AutoModelForImageTextToText

from skipvision.config import SkipConfig
from skipvision.errors import UnsupportedModelError
from skipvision.families import dissect


@dataclass(frozen=True)
class Ratio:
    """The fields of a `Cost` as fractions of the full-token cost."""

    prefill_flops: float
    decode_flops: float
    train_flops: float
    kv_bytes: float


@dataclass(frozen=True)
class Cost:
    """Cost of one row.

    Attributes:
        prefill_flops: vision tower, planning (probe included), decoder, LM head at the last position;
            LoRA counted as merged.
        decode_flops: the ``new_tokens − 1`` steps behind the prefill.
        train_flops: one training step's forward and backward over prompt and answer, LM head at the
            answer's positions, vision tower frozen.
        kv_bytes: keys and values in the cache right after prefill.
        planning_flops: the part of ``prefill_flops`` that select, merge, probe and summary take.
        vision_flops: the part of ``prefill_flops`` that vision tower and projector take.
        weight_bytes: of the whole model.
        sequence: length of the reduced prompt.
        full: the same without Skip-Vision; None on the full cost itself.
    """

    prefill_flops: int
    decode_flops: int
    train_flops: int
    kv_bytes: int
    planning_flops: int
    vision_flops: int
    weight_bytes: int
    sequence: int
    full: Cost | None = None

    @property
    def ratio_to_full(self) -> Ratio:
        """Each of `Ratio`'s fields divided by the full-token cost."""
        full = self.full or self
        return Ratio(
            **{
                f.name: getattr(self, f.name) / getattr(full, f.name) if getattr(full, f.name) else 1.0
                for f in fields(Ratio)
            }
        )


@dataclass(frozen=True)
class _Geometry:
    """What matters of a model: multiply-adds per token of one layer's products, and sizes.

    ``…_sites`` are (in, out) features of linear layers: ``input_sites`` read the layer's input (q, k, v).
    """

    layers: int
    hidden: int
    attention_width: int
    attention_macs: int
    ffn_macs: int
    input_sites: tuple[tuple[int, int], ...]
    lora_sites: tuple[tuple[int, int], ...]
    ffn_lora_sites: tuple[tuple[int, int], ...]
    vocabulary: int
    kv_values: int
    vision_flops: int
    projector_flops: int
    weights: int
    element_bytes: int
    tokens_per_image: int


def predict_cost(
    model_config: PretrainedConfig,
    config: SkipConfig | None,
    *,
    images: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 32,
    visual_tokens: int | None = None,
    lora_rank: int = 16,
    dtype: torch.dtype | None = None,
) -> Cost:
    """Predict what one row costs; needs no weights.

    Args:
        model_config: the whole model's config (``model.config``).
        config: None or ``SkipConfig.full()`` for full tokens.
        images: images in the row.
        text_tokens: prompt tokens that are not visual.
        new_tokens: tokens generated; in training, the answer's tokens.
        visual_tokens: N per image, if not the family's standard (several views, another resolution).
        lora_rank: rank of the LoRA on every linear layer of the decoder; 0 = full fine-tuning of the
            decoder.
        dtype: of the KV cache; the config's by default.

    Raises:
        UnsupportedModelError: no such family.
    """
    geometry = _measure(model_config, dtype)
    per_image = visual_tokens if visual_tokens is not None else geometry.tokens_per_image
    full = _cost(geometry, SkipConfig.full(), images, per_image, text_tokens, new_tokens, lora_rank, None)
    if config is None:
        return full
    return _cost(geometry, config, images, per_image, text_tokens, new_tokens, lora_rank, full)


def measure_flops(function: Callable[[], Any]) -> int:
    """FLOPs that a call executes, counted operation by operation, fused CPU attention included."""
    cpu = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            cpu._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
            cpu._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
    with counter:
        function()
    return int(counter.get_total_flops())


def _attention_forward(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    # Fused CPU attention takes grouped keys as they are; every query head does the full product.
    heads = query[:2]
    return int(sdpa_flop_count(query, (*heads, *key[2:]), (*heads, *value[2:])))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_forward(query, key, value)


def _cost(
    g: _Geometry,
    config: SkipConfig,
    images: int,
    per_image: int,
    text: int,
    new: int,
    rank: int,
    full: Cost | None,
) -> Cost:
    retained, skipped = config.counts(per_image)
    summaries = config.summary_tokens * ((retained > 0) + (skipped > 0))
    reduced = images * (retained + skipped + summaries)
    short = images * skipped if config.skip_ffn else 0
    forgotten = images * skipped if config.skip_kv else 0

    def decoder(tokens: int, keys: int, ffn_tokens: int) -> int:
        """One forward through all layers for ``tokens`` queries over ``keys`` keys."""
        attention = 4 * tokens * keys * g.attention_width
        return g.layers * (2 * tokens * g.attention_macs + attention + 2 * ffn_tokens * g.ffn_macs)

    def head(tokens: int) -> int:
        return 2 * tokens * g.hidden * g.vocabulary

    vision = images * (g.vision_flops + per_image * g.projector_flops)
    prompt = reduced + text
    planning = _planning(g, config, images, per_image, text)
    prefill = vision + planning + decoder(prompt, prompt, prompt - short) + head(1)
    cached = prompt - forgotten
    decode = sum(decoder(1, cached + step, 1) + head(1) for step in range(1, new))
    whole = prompt + new
    # With text behind the prompt the probe runs over more.
    planning_train = _planning(g, config, images, per_image, text + new)
    if config.select == "ffn_ratio":
        # The probe's layers carry the LoRA that is being trained.
        sites = sum(a + b for a, b in (*g.lora_sites, *g.ffn_lora_sites))
        planning_train += (config.probe_layer + 1) * 2 * rank * sites * (images * per_image + text + new)
    train = vision + planning_train + (2 if rank else 3) * head(new)
    train += _training(g, decoder(whole, whole, whole - short), whole, short, rank)
    if rank and not config.summary_tokens:
        # Nothing below the first layer trains, so no gradient of its input is computed.
        train -= 2 * whole * sum(a * b + a * rank for a, b in g.input_sites)
    return Cost(
        prefill_flops=prefill,
        decode_flops=decode,
        train_flops=train,
        kv_bytes=cached * g.kv_values * g.element_bytes,
        planning_flops=planning,
        vision_flops=vision,
        weight_bytes=g.weights * g.element_bytes,
        sequence=prompt,
        full=full,
    )


def _training(g: _Geometry, forward: int, tokens: int, short: int, rank: int) -> int:
    """Decoder's forward and backward. Frozen weights need the gradient of their input only."""
    attention = g.layers * 4 * tokens * tokens * g.attention_width
    if not rank:
        return 3 * forward
    sites = tokens * sum(a + b for a, b in g.lora_sites) + (tokens - short) * sum(
        a + b for a, b in g.ffn_lora_sites
    )
    return 2 * forward + attention + 3 * 2 * rank * g.layers * sites


def _planning(g: _Geometry, config: SkipConfig, images: int, per_image: int, text: int) -> int:
    """Matrix products of select, merge, summary and probe; sums and sorts are not FLOPs here."""
    retained, skipped = config.counts(per_image)
    flops = 0
    if config.select == "diversity" and retained < per_image:
        flops += 2 * images * per_image * per_image * g.hidden
    leaving = per_image - retained - skipped
    if config.merge == "similarity" and leaving:
        flops += 2 * images * leaving * (skipped or retained) * g.hidden
    flops += 2 * images * (retained + skipped) * g.hidden * config.summary_tokens
    if config.select == "ffn_ratio":
        length = images * per_image + text
        layer = 2 * length * (g.attention_macs + g.ffn_macs) + 4 * length * length * g.attention_width
        flops += (config.probe_layer + 1) * layer
    return flops


def _measure(model_config: PretrainedConfig, dtype: torch.dtype | None) -> _Geometry:
    """Read the geometry off the model built without weights (meta device), one decoder layer deep."""
    small = deepcopy(model_config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    small._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(small, dtype=torch.float32)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model_config).__name__}: {error}") from error
    anatomy = dissect(model)
    layer = anatomy.decoder.get_submodule("layers.0")
    ffn = [m for m in anatomy.layers[0].mlp.modules() if isinstance(m, nn.Linear)]
    everything = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    attention = [m for m in everything if not any(m is other for other in ffn)]
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    per_image = _tokens_per_image(model_config)
    vision_config = small.vision_config
    image = torch.empty(1, 3, vision_config.image_size, vision_config.image_size, device="meta")
    vision_flops = measure_flops(lambda: anatomy.outer.get_submodule("vision_tower")(image))
    projector = anatomy.outer.get_submodule("multi_modal_projector")
    features = torch.empty(1, 1, vision_config.hidden_size, device="meta")
    projector_flops = measure_flops(lambda: projector(features))
    saved_in = model_config.dtype
    element = dtype or (saved_in if isinstance(saved_in, torch.dtype) else torch.float32)
    rest = sum(p.numel() for p in model.parameters()) + (layers - 1) * sum(
        p.numel() for p in layer.parameters()
    )
    return _Geometry(
        layers=layers,
        hidden=text.hidden_size,
        attention_width=heads * head_dim,
        attention_macs=sum(m.weight.numel() for m in attention),
        ffn_macs=sum(m.weight.numel() for m in ffn),
        input_sites=tuple((m.in_features, m.out_features) for m in attention[:-1]),
        lora_sites=tuple((m.in_features, m.out_features) for m in attention),
        ffn_lora_sites=tuple((m.in_features, m.out_features) for m in ffn),
        vocabulary=text.vocab_size,
        kv_values=2 * layers * key_heads * head_dim,
        vision_flops=vision_flops,
        projector_flops=projector_flops,
        weights=rest,
        element_bytes=element.itemsize,
        tokens_per_image=per_image,
    )


def _tokens_per_image(config: PretrainedConfig) -> int:
    vision = config.vision_config
    patches = int(vision.image_size // vision.patch_size) ** 2
    return patches + (getattr(config, "vision_feature_select_strategy", None) == "full")
