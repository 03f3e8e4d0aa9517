"""The parts of a Hugging Face model that Skip-Vision hooks, and what differs between model families.

Most image-text-to-text families of transformers 5.23 share one shape. An outer model encodes images by
``get_image_features`` or takes them encoded as ``mm_encoder_outputs``, puts them at placeholder tokens, and
calls a text decoder with ``inputs_embeds``. Each decoder layer mixes tokens, by attention or a recurrence,
and then has a feed-forward network; or it is one of both. A family of that shape declares nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from skipvision._compat import submodules
from skipvision.anatomy.checks import check_cache_layers
from skipvision.anatomy.images import Images
from skipvision.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """How one family departs from the common shape.

    Attributes:
        tiles: adjacent encoded entries (an image cut into tiles, and a thumbnail) are one image.
        rows: an encoded entry holds all images of a row, each of ``image_seq_len`` visual tokens.
        one_a_row: all visual tokens of a row are one image: the encoder does not say where one ends.
        base_view: the view of the whole image comes before ("first") or after ("last") the high-resolution
            crops among an image's visual tokens (select="views"); None = one view only.
        whole_prompt: text around images depends on them, so a prompt cannot be prefilled in two parts. In
            some of these families, text before an image attends to tokens after it. In others, marker
            tokens after an image are replaced by its features.
        patches: each visual token is a patch of the one square image that the tower sees, in raster order.
        one_by_one: a prompt's result depends on the others in its batch, as where inputs index into each
            other, so several prompts cannot share one.
        geometry: how its processor cuts an image (`skipvision.analysis.geometry`); None = unknown.
        refused: why it is not supported, where the modules do not show it; None = it may be.
    """

    tiles: bool = False
    rows: bool = False
    one_a_row: bool = False
    base_view: Literal["first", "last"] | None = None
    whole_prompt: bool = False
    patches: bool = False
    one_by_one: bool = False
    geometry: Geometry | None = None
    refused: str | None = None


Geometry = Literal["square", "grid", "tiles", "canvas", "any_resolution"]

_OWN_GENERATE = "its own generate runs the text model alone, on embeddings with the images merged in"
_MERGES_INSIDE = (
    "it has no separate text model: the module with its layers turns images into codes of the vocabulary and "
    "merges their embeddings itself"
)
_FOUR_STREAMS = (
    "its layers predict and correct four streams of hidden states (AltUp); Skip-FFN is defined for one, to "
    "which attention and FFN are added"
)
_COUNTED_DISTANCES = "attention counts distances between entries of the cache, which pruning changes"

FAMILIES: dict[str, Family] = {
    "llava": Family(patches=True, geometry="square"),
    "vipllava": Family(patches=True, geometry="square"),
    "gemma3": Family(geometry="square"),
    "qwen2_vl": Family(geometry="grid"),
    "qwen2_5_vl": Family(geometry="grid"),
    "qwen3_vl": Family(geometry="grid"),
    "qwen3_vl_moe": Family(geometry="grid"),
    "llava_next": Family(base_view="first", geometry="any_resolution"),
    "llava_onevision": Family(base_view="first"),
    "llava_next_video": Family(base_view="first", geometry="any_resolution"),
    "internvl": Family(tiles=True, base_view="last", geometry="canvas"),
    "qianfan_ocr": Family(tiles=True, base_view="last"),
    "idefics2": Family(rows=True),
    "idefics3": Family(rows=True, geometry="tiles"),
    "smolvlm": Family(rows=True, geometry="tiles"),
    "perception_lm": Family(tiles=True),
    "paligemma": Family(whole_prompt=True, patches=True),
    "ovis2": Family(whole_prompt=True),
    "molmo2": Family(one_by_one=True),
    "ernie4_5_vl_moe": Family(whole_prompt=True),
    "granite_docling": Family(rows=True),
    "fuyu": Family(one_a_row=True),
    "blip-2": Family(refused=_OWN_GENERATE),
    "instructblip": Family(refused=_OWN_GENERATE),
    "chameleon": Family(refused=_MERGES_INSIDE),
    "gemma3n": Family(refused=_FOUR_STREAMS),
    "inkling2": Family(refused=_COUNTED_DISTANCES),
    "inkling_mm_model": Family(refused=_COUNTED_DISTANCES),
}
"""Families that depart from the common shape, by the ``model_type`` of their config."""

_IMAGE_PARTS = ("vision", "image", "vq_")
_DECODERS = ("language_model", "text_model")
_MAMBA = "mamba"
_MIXERS = ("self_attn", "linear_attn", "conv", _MAMBA)
_EITHER = "mixer"
"""Name of the one half of layers that have one: it mixes tokens, or it is a feed-forward network."""
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")
_EXPERTS = "experts"
_CROSS_ATTENTION = ("cross_attn", "crossattention")
_SIDE_BY_SIDE = "attention and a recurrence side by side in one layer"
_STATES = "cache_params"
"""Keyword of the cache in modules that keep a state instead of keys and values."""
_ATTENDS_ACROSS = "cross-attention instead of placeholder tokens"


class Layer(NamedTuple):
    """A decoder layer and its two halves, of which one may be missing.

    ``attention`` mixes tokens; ``recurrent`` says that it is linear attention, Mamba or a short convolution,
    and ``passes_plan`` that the layer passes the plan on to it.
    """

    whole: nn.Module
    attention: nn.Module | None
    mlp: nn.Module | None
    recurrent: bool = False
    passes_plan: bool = True

    @property
    def attends(self) -> bool:
        """Whether its tokens attend to each other, so that they have keys and values."""
        return self.attention is not None and not self.recurrent


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model that hooks are placed on.

    Attributes:
        family: how its family departs from the common shape.
        outer: module that is called with ``input_ids``, encodes images, and calls the decoder.
        decoder: text decoder, called with ``inputs_embeds``.
        layers: the decoder's layers.
        image_token_id: placeholder token of one visual token.
        text_config: the decoder's config.
        hidden_size: width of the decoder.
        view_size: visual tokens of one view if the whole image's view comes first; else 0.
    """

    family: Family
    outer: nn.Module
    decoder: nn.Module
    layers: tuple[Layer, ...]
    image_token_id: int
    text_config: Any
    hidden_size: int
    view_size: int


def family_of(config: PretrainedConfig) -> Family:
    """Return what the family of a model's config declares."""
    return FAMILIES.get(config.model_type, Family())


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a model, also inside PEFT, DDP or compile wrappers; raise `UnsupportedModelError`."""
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if base is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} contains no Hugging Face PreTrainedModel: load the model with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    _refuse_family(base)
    outer, decoder, layers = _find_decoder(base)
    text_config: Any = decoder.config
    check_cache_layers(decoder)
    halves = tuple(_halves(layer, number) for number, layer in enumerate(layers))
    _check_halves(halves, type(decoder).__name__)
    if not hasattr(outer, "get_image_features"):
        raise UnsupportedModelError(
            f"{type(outer).__name__} has no get_image_features: the number of visual tokens of an image is "
            "unknown",
            "no get_image_features",
        )
    image_token = getattr(base.config, "image_token_id", None)
    if image_token is None:
        raise UnsupportedModelError(
            f"the config of {type(base).__name__} names no image_token_id: its prompts do not hold images as "
            "placeholder tokens",
            "no placeholder tokens",
        )
    return Anatomy(
        family=family_of(base.config),
        outer=outer,
        decoder=decoder,
        layers=halves,
        image_token_id=int(image_token),
        text_config=text_config,
        hidden_size=int(text_config.hidden_size),
        view_size=_patches(base.config) if family_of(base.config).base_view == "first" else 0,
    )


def lm_head(model: PreTrainedModel) -> nn.Module:
    """Return the layer that computes logits, which a causal language model inside may own."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    head = next((head for part in parts if (head := part.get_output_embeddings()) is not None), None)
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no LM head: it computes no logits of words")
    return head


def base_view(anatomy: Anatomy, images: Images, entries: list[int]) -> torch.Tensor:
    """(I, N) mask of the whole image's view; ``entries`` are the sizes that `encode` returned."""
    number = torch.arange(images.valid.shape[1], device=images.valid.device)
    if anatomy.family.base_view == "first":
        return images.valid & (number < anatomy.view_size)
    # All tiles have one size, and the last is the whole image's thumbnail.
    sizes = images.valid.sum(dim=1, keepdim=True)
    return images.valid & (number >= sizes - entries[-1])


def check_patches(anatomy: Anatomy, sizes: list[int]) -> None:
    """Raise `UnsupportedModelError` unless each image has the patches of the tower's one square image."""
    expected = _patches(anatomy.outer.config)  # type: ignore[arg-type]
    if set(sizes) - {expected}:
        raise UnsupportedModelError(
            f"images of {sizes} visual tokens, where the tower's square image has {expected} patches: "
            "which token is which patch cannot be known. Choose another select or merge",
            "visual tokens that are not patches of a square",
        )


def _patches(config: PretrainedConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def _refuse_family(base: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if a model takes no images, or its family is known not to work."""
    reason = family_of(base.config).refused
    if reason is not None:
        raise UnsupportedModelError(f"{type(base).__name__} is not supported: {reason}", reason)
    if not takes_images(base.config) and not any(hasattr(m, "get_image_features") for m in base.modules()):
        raise text_only(type(base).__name__)


def takes_images(config: PretrainedConfig) -> bool:
    """Return whether a model of this config may take images, by the parts that the config names."""
    parts = {*getattr(config, "sub_configs", {}), *vars(config)}
    return any(part in name for name in parts for part in _IMAGE_PARTS)


def text_only(name: str) -> UnsupportedModelError:
    """Return the error about a model, or the config of one, that reads text alone."""
    return UnsupportedModelError(
        f"{name} takes no images, so it has no visual tokens to skip: load a vision-language model with "
        "AutoModelForImageTextToText.from_pretrained",
        "takes no images",
    )


def _find_decoder(base: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """Return the outer module, the decoder it calls, and the decoder's layers."""
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its decoder cross-attends to images, so it has no visual tokens "
            "that could be skipped",
            "encoder-decoder",
        )
    parts = ((outer, submodules(outer).get(part)) for outer in base.modules() for part in _DECODERS)
    outer, decoder = next((pair for pair in parts if pair[1] is not None), (base, None))
    if decoder is None:
        raise UnsupportedModelError(
            f"{name} has no {' or '.join(_DECODERS)}: it has no text decoder module that is called "
            "with the images' embeddings",
            _ATTENDS_ACROSS if _attends_across(base) else "no text decoder module",
        )
    # In a causal language model, an inner module has the layers.
    for inside in ("model", "decoder"):
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            decoder = getattr(decoder, inside, decoder)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"{name} has no decoder with a list of layers: {type(decoder).__name__} does not have the shape "
            "that Skip-Vision hooks",
            "no list of decoder layers",
        )
    return outer, decoder, layers


def _attends_across(module: nn.Module) -> bool:
    return any(name.endswith(_CROSS_ATTENTION) for name, _ in module.named_modules())


def _halves(layer: nn.Module, number: int) -> Layer:
    parts = submodules(layer)
    mixers = [part for name in _MIXERS if (part := parts.get(name)) is not None]
    networks = [part for name in _FEED_FORWARD if (part := parts.get(name)) is not None]
    attention, mlp = next(iter(mixers), None), next(iter(networks), None)
    several = len(networks) > 1 or parts.get(_EXPERTS) is not None
    either = parts.get(_EITHER)
    if either is not None and attention is None and mlp is None:
        attention, mlp = (either, None) if _keeps_something(either) else (None, either)
    elif len(mixers) != 1 or mlp is None or several:
        if _attends_across(layer):
            reason = _ATTENDS_ACROSS
        elif several:
            reason = "experts next to the feed-forward module"
        elif len(mixers) > 1:
            reason = _SIDE_BY_SIDE
        else:
            reason = (
                f"decoder layers without {'self-attention' if attention is None else 'a feed-forward module'}"
            )
        raise UnsupportedModelError(
            f"layer {number} of the decoder ({type(layer).__name__}) consists of "
            f"{', '.join(parts)}: only layers of one token mixer (self-attention, linear attention, Mamba "
            "or a short convolution) and one feed-forward network can be skipped",
            reason,
        )
    recurrent = attention is not None and _is_recurrent(attention, parts)
    if attention is not None and recurrent and not _takes_keywords(attention):
        raise UnsupportedModelError(
            f"layer {number} of the decoder does not pass its keywords on to {type(attention).__name__}, so "
            "gradient checkpointing could not repeat the plan: a newer transformers does",
            "layers that do not pass the plan on",
        )
    return Layer(layer, attention, mlp, recurrent, attention is None or parts.get(_MAMBA) is not attention)


def _check_halves(layers: tuple[Layer, ...], decoder: str) -> None:
    """Raise `UnsupportedModelError` if no layer has the half that Skip-Vision acts on."""
    halves = {
        "attention": any(layer.attends for layer in layers),
        "a feed-forward network": any(layer.mlp is not None for layer in layers),
    }
    lacks = next((half for half, present in halves.items() if not present), None)
    if lacks is not None:
        raise UnsupportedModelError(
            f"no layer of {decoder} has {lacks}: there is nothing that skipped tokens could leave out",
            f"no layer with {lacks}",
        )


def _keeps_something(module: nn.Module) -> bool:
    """Return whether a module takes a cache, as those do that mix tokens."""
    return not {"past_key_values", _STATES}.isdisjoint(inspect.signature(module.forward).parameters)


def _is_recurrent(attention: nn.Module, parts: Mapping[str, nn.Module | None]) -> bool:
    named = all(parts.get(name) is not attention for name in ("self_attn", _EITHER))
    return named or _STATES in inspect.signature(attention.forward).parameters


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
