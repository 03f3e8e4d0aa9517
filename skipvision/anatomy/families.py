"""What Skip-Vision needs of a Hugging Face model, found by shape; and what differs between families.

The common shape, which most image-text-to-text families of transformers 5.23 share: an outer model that
encodes images by ``get_image_features``, takes them ready-made as ``mm_encoder_outputs``, puts them at
placeholder tokens, and calls a text decoder with ``inputs_embeds``; a decoder whose layers each have
self-attention and then a feed-forward network. A family of that shape needs nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from skipvision.anatomy.images import Images
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.kv_cache import refuse_states


@dataclass(frozen=True)
class Family:
    """What one family declares beyond the common shape.

    Attributes:
        tiles: what the family encodes as several entries side by side (an image cut into tiles, and a
            thumbnail) is one image.
        rows: what the family encodes as one entry is all the images of a row, each of ``image_seq_len``
            visual tokens.
        base_view: where the view of the whole image stands among its visual tokens, behind or before
            the high-resolution crops (select="views"); None = there is one view only.
        whole_prompt: what stands around images depends on them, so a prompt cannot be read in two parts: text
            before an image attends to what is behind it, or marks behind an image become features of it.
        patches: each visual token is a patch of the one square picture that its tower sees, in raster order.
        one_by_one: its inputs point into each other, so those of several prompts cannot be put together.
        geometry: how its processor cuts an image (`skipvision.analysis.geometry`); None = not known.
    """

    tiles: bool = False
    rows: bool = False
    base_view: Literal["first", "last"] | None = None
    whole_prompt: bool = False
    patches: bool = False
    one_by_one: bool = False
    geometry: Geometry | None = None


Geometry = Literal["square", "grid", "tiles", "canvas", "any_resolution"]

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
    "paligemma": Family(whole_prompt=True, patches=True),
    "ovis2": Family(whole_prompt=True),
    "molmo2": Family(one_by_one=True),
    "ernie4_5_vl_moe": Family(whole_prompt=True),
    "granite_docling": Family(rows=True),
}
"""Families that declare something, by the ``model_type`` of their config."""

_DECODERS = ("language_model", "text_model")
_ATTENTION = ("self_attn",)
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe")
_MORE_FEED_FORWARD = ("experts",)
_CROSS_ATTENTION = ("cross_attn", "crossattention")
_ATTENDS_ACROSS = "cross-attention instead of placeholder tokens"
_PIXELS = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "high_res_pixel_values",
    "image_patches",
)
_VIDEOS = ("pixel_values_videos",)
_GRID = "_grid_thw"
_SLICED = {"pooler_output", "deepstack_features"}


class Layer(NamedTuple):
    """A decoder layer and its two halves."""

    whole: nn.Module
    attention: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """The parts of one live model that hooks go on.

    Attributes:
        outer: module that is called with ``input_ids``, encodes images, and calls the decoder.
        decoder: text decoder, called with ``inputs_embeds``.
        layers: its layers.
        image_token_id: placeholder token of one visual token.
        text_config: the decoder's.
        hidden_size: width of the decoder.
        view_size: visual tokens of one view where the whole image's view comes first; else 0.
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
    """What the family of a model's config declares."""
    return FAMILIES.get(config.model_type, Family())


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a model, also below PEFT, DDP or compile wrappers; raises `UnsupportedModelError`."""
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if base is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} contains no Hugging Face PreTrainedModel: load the model with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    outer, decoder, layers = _find_decoder(base)
    text_config: Any = decoder.config
    refuse_states(text_config)
    halves = tuple(_halves(layer, number) for number, layer in enumerate(layers))
    if not hasattr(outer, "get_image_features"):
        raise UnsupportedModelError(
            f"{type(outer).__name__} has no get_image_features: how many visual tokens an image has cannot "
            "be known",
            "no get_image_features",
        )
    image_token = getattr(base.config, "image_token_id", None)
    if image_token is None:
        raise UnsupportedModelError(
            f"the config of {type(base).__name__} names no image_token_id: images do not stand in its prompt "
            "as placeholder tokens",
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


def base_view(anatomy: Anatomy, images: Images, entries: list[int]) -> torch.Tensor:
    """(I, N) tokens of the view of the whole image; ``entries`` are the sizes that `encode` gave."""
    place = torch.arange(images.valid.shape[1], device=images.valid.device)
    if anatomy.family.base_view == "first":
        return images.valid & (place < anatomy.view_size)
    # Tiles are of one size, the whole image's thumbnail the last of them.
    sizes = images.valid.sum(dim=1, keepdim=True)
    return images.valid & (place >= sizes - entries[-1])


def check_patches(anatomy: Anatomy, sizes: list[int]) -> None:
    """Raise `UnsupportedModelError` unless each image has the patches of the tower's one square picture."""
    expected = _patches(anatomy.outer.config)  # type: ignore[arg-type]
    if set(sizes) - {expected}:
        raise UnsupportedModelError(
            f"images of {sizes} visual tokens, where the tower's square picture has {expected} patches: "
            "which token is which patch cannot be known. Choose another select or merge",
            "visual tokens that are not patches of a square",
        )


def _patches(config: PretrainedConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def encode(outer: nn.Module, call: Mapping[str, Any], placeholders: int) -> tuple[dict[str, Any], list[int]]:
    """Encode the images (and videos) of a call ahead of it, as ``generate`` does before its first step.

    Args:
        outer: the outer model.
        call: keyword arguments of its call.
        placeholders: image placeholders in its prompt.

    Returns:
        The keyword arguments with encoded images in place of pixels, and the visual tokens of each
        encoded entry in the order of their placeholders.
    """
    if not _takes_encoded_images(outer):
        return dict(call), _equal_sizes(call, placeholders)
    encoded = _encoded(outer, call)
    if encoded.get("image") is None:
        raise _no_images(placeholders)
    others = {name: value for name, value in call.items() if name not in _PIXELS}
    return {**others, "mm_encoder_outputs": encoded}, _sizes(outer, encoded["image"])


def encoded_sizes(outer: nn.Module, call: Mapping[str, Any]) -> list[int]:
    """The visual tokens of each entry that the images of a call are encoded to."""
    return _sizes(outer, _encoded(outer, call)["image"])


def _sizes(outer: nn.Module, encoded: Any) -> list[int]:
    sizes = [len(entry) for entry in _entries(outer, encoded)]
    model: Any = outer
    if not family_of(model.config).rows:
        return sizes
    return [model.image_seq_len] * (sum(sizes) // model.image_seq_len)


def _encoded(outer: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """What is encoded already and what a call's pixels are encoded to, by modality."""
    encoded = dict(call.get("mm_encoder_outputs") or {})
    _refuse_slices(outer, encoded.get("image"))
    for modality in ("image", "video"):
        encoder = getattr(outer, f"get_{modality}_features", None)
        if encoder is None or encoded.get(modality) is not None:
            continue
        inputs = {name: call[name] for name in inspect.signature(encoder).parameters if name in call}
        if _has_pixels(inputs):
            _refuse_missing(encoder, inputs)
            _refuse_other_patches(encoder, inputs)
            encoded[modality] = encoder(**inputs, return_dict=True)
    return encoded


def _refuse_slices(outer: nn.Module, encoded: Any) -> None:
    """Raise `InputError` for the parts of images that ``generate(prefill_chunk_size=…)`` hands over."""
    if isinstance(encoded, Mapping) and encoded.keys() <= _SLICED:
        raise InputError(
            f"encoded images hold {', '.join(encoded)} alone, as generate(prefill_chunk_size=…) cuts them: "
            "where an image begins and ends cannot be known. Leave prefill_chunk_size "
            f"out, or pass all that {type(outer).__name__}.get_image_features returns"
        )


def _refuse_missing(encoder: Any, inputs: Mapping[str, Any]) -> None:
    needed = [
        name
        for name, parameter in inspect.signature(encoder).parameters.items()
        if (parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
        or name.endswith(_GRID)
    ]
    given = [name for name, value in inputs.items() if value is not None]
    missing = [name for name in needed if name not in given]
    if missing:
        raise InputError(
            f"{encoder.__qualname__} needs {', '.join(missing)} beside {', '.join(given)}: pass the "
            "processor's output as it is"
        )


def _refuse_other_patches(encoder: Any, inputs: Mapping[str, Any]) -> None:
    """Raise `InputError` unless there are as many flattened patches as the grids ask for."""
    grid = next((value for name, value in inputs.items() if name.endswith(_GRID)), None)
    pixels = next((inputs[name] for name in _PIXELS if inputs.get(name) is not None), None)
    if grid is None or pixels is None:
        return
    asked = int(grid.prod(dim=-1).sum())
    if len(pixels) != asked:
        raise InputError(
            f"{encoder.__qualname__} got {len(pixels)} patches of pixels, but grids {grid.tolist()} that ask "
            f"for {asked}: pass the processor's output as it is"
        )


def _entries(outer: nn.Module, encoded: Any) -> Iterable[torch.Tensor]:
    """The visual tokens of each encoded image or tile."""
    features = encoded.get("pooler_output")
    if features is None:
        features = encoded.get("last_hidden_state")
    if features is None:
        raise UnsupportedModelError(
            f"{type(outer).__name__} encodes images to {', '.join(encoded)}, not to visual tokens of each "
            "image (pooler_output): what to select from cannot be known",
            "images are not encoded to one feature for each visual token",
        )
    if isinstance(features, torch.Tensor) and features.ndim == 2:
        raise UnsupportedModelError(
            f"{type(outer).__name__} encodes images to features of shape {tuple(features.shape)}: where one "
            "image ends and the next begins cannot be known",
            "encoded images are not told apart",
        )
    return features


def brings_images(call: Mapping[str, Any]) -> bool:
    """Whether a call comes with images, as pixels or encoded."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    return encoded is not None or _has_pixels(call, [name for name in _PIXELS if name not in _VIDEOS])


def skips_videos(call: Mapping[str, Any]) -> bool:
    """Whether a call comes with videos, whose tokens no plan is made for."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("video")
    return encoded is not None or _has_pixels(call, _VIDEOS)


def _has_pixels(call: Mapping[str, Any], names: Iterable[str] = _PIXELS) -> bool:
    return any(call.get(name) is not None and len(call[name]) for name in names)


def _no_images(placeholders: int) -> InputError:
    return InputError(
        f"input_ids hold {placeholders} image placeholders but neither pixel_values nor encoded images came "
        "with them: pass the processor's output as it is, or a prompt without images"
    )


def _find_decoder(base: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """The outer module, the decoder it calls, and the decoder's layers."""
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its decoder attends to images across, they are no tokens of its "
            "own that could be skipped",
            "encoder-decoder",
        )
    parts = ((outer, outer._modules.get(part)) for outer in base.modules() for part in _DECODERS)
    outer, decoder = next((pair for pair in parts if pair[1] is not None), (base, None))
    if decoder is None:
        raise UnsupportedModelError(
            f"{name} has no {' or '.join(_DECODERS)}: its text decoder is not a module of its own that is "
            "called with the images' embeddings",
            _ATTENDS_ACROSS if _attends_across(base) else "no text decoder of its own",
        )
    # A causal language model as decoder: what has the layers is inside.
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


def _takes_encoded_images(outer: nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(outer.forward).parameters


def _equal_sizes(call: Mapping[str, Any], placeholders: int) -> list[int]:
    """Visual tokens of each image where images cannot be encoded ahead (transformers before 5.23)."""
    pixels = call.get("pixel_values")
    if pixels is None:
        raise _no_images(placeholders)
    if pixels.ndim != 4 or len(pixels) == 0 or placeholders % len(pixels):
        raise InputError(
            f"{placeholders} image placeholders cannot be shared out among pixel_values of shape "
            f"{tuple(pixels.shape)}: build input_ids and pixel_values with one processor call; images of "
            "different sizes need transformers 5.23 or newer"
        )
    return [placeholders // len(pixels)] * len(pixels)


def _halves(layer: nn.Module, number: int) -> Layer:
    attention = next((layer._modules[n] for n in _ATTENTION if n in layer._modules), None)
    mlp = next((layer._modules[n] for n in _FEED_FORWARD if n in layer._modules), None)
    others = [name for name in _MORE_FEED_FORWARD if name in layer._modules]
    if attention is None or mlp is None or others:
        if _attends_across(layer):
            reason = _ATTENDS_ACROSS
        elif others:
            reason = "experts beside the feed-forward module"
        else:
            reason = (
                f"decoder layers without {'self-attention' if attention is None else 'a feed-forward module'}"
            )
        raise UnsupportedModelError(
            f"layer {number} of the decoder ({type(layer).__name__}) is made of "
            f"{', '.join(layer._modules)}: only layers of self-attention and a feed-forward network can be "
            "skipped, and only attention can forget a token",
            reason,
        )
    return Layer(layer, attention, mlp)
