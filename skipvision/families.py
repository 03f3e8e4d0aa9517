"""What differs between Hugging Face model families, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from skipvision.errors import InputError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One family, declared.

    Attributes:
        decoder: attribute of the outer model under which it calls its text decoder.
        image_token: config field with the id of the placeholder token.
        image_sizes: (call's keyword arguments, placeholders in the batch) → visual tokens of each image.
        tokens_per_image: config → N of an image of the standard size.
        multi_view: images come as a base view and crops (select="views").
    """

    decoder: str
    image_token: str
    image_sizes: Callable[[Mapping[str, Any], int], list[int]]
    tokens_per_image: Callable[[PretrainedConfig], int]
    multi_view: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The parts of one live model that hooks go on.

    Attributes:
        outer: module that is called with ``input_ids`` and calls the decoder.
        decoder: text decoder, called with ``inputs_embeds``.
        layers: its layers, each with ``self_attn`` and ``mlp``.
        image_token_id: placeholder token of one visual token.
        hidden_size: width of the decoder.
    """

    family: Family
    outer: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    image_token_id: int
    hidden_size: int


def _fixed_size_images(call: Mapping[str, Any], placeholders: int) -> list[int]:
    """Every image has the same number of visual tokens (CLIP or SigLIP tower with a fixed resolution)."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return [len(features) for features in encoded.pooler_output]
    pixel_values = call.get("pixel_values")
    if pixel_values is None:
        raise InputError(
            f"input_ids hold {placeholders} image placeholders but neither pixel_values nor encoded images "
            "came with them: pass the processor's pixel_values, or a prompt without <image>"
        )
    images = len(pixel_values)
    if images == 0 or placeholders % images:
        raise InputError(
            f"{placeholders} image placeholders cannot be shared out among {images} images of equal size: "
            "build input_ids and pixel_values with one processor call"
        )
    return [placeholders // images] * images


def _llava_tokens(config: PretrainedConfig) -> int:
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full")


FAMILIES: dict[str, Family] = {
    "llava": Family(
        decoder="language_model",
        image_token="image_token_id",
        image_sizes=_fixed_size_images,
        tokens_per_image=_llava_tokens,
    ),
}
"""Supported families by the ``model_type`` of their config."""


def family_of(config: PretrainedConfig) -> Family:
    """The family a model's config belongs to; raises `UnsupportedModelError`."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return family


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a model, also below PEFT, DDP or compile wrappers; raises `UnsupportedModelError`."""
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if base is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} contains no Hugging Face PreTrainedModel: load the model with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    family = family_of(base.config)
    outer = next((m for m in base.modules() if family.decoder in m._modules), None)
    decoder = getattr(outer, family.decoder, None)
    layers = getattr(decoder, "layers", None)
    if outer is None or decoder is None or not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no {family.decoder!r} with a list of layers: its decoder "
            f"({type(decoder).__name__}) does not have the shape that Skip-Vision hooks"
        )
    for number, layer in enumerate(layers):
        for part in ("self_attn", "mlp"):
            if not isinstance(getattr(layer, part, None), nn.Module):
                raise UnsupportedModelError(
                    f"layer {number} of {type(decoder).__name__} ({type(layer).__name__}) has no {part!r}: "
                    "only layers made of self-attention and a feed-forward network can be skipped"
                )
    return Anatomy(
        family=family,
        outer=outer,
        decoder=decoder,
        layers=layers,
        image_token_id=int(getattr(base.config, family.image_token)),
        hidden_size=int(decoder.config.hidden_size),
    )
