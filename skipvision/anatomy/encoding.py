"""Encode the images of a call ahead of it, and count the visual tokens of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from skipvision._compat import (
    ENCODED,
    MODALITIES,
    encoder_defaults,
    encoder_of,
    model_output,
    takes_encoded,
)
from skipvision.anatomy.families import family_of
from skipvision.errors import InputError, UnsupportedModelError

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


def encode(outer: nn.Module, call: Mapping[str, Any], placeholders: int) -> tuple[dict[str, Any], list[int]]:
    """Encode the images (and videos) of a call ahead of it, as ``generate`` does before its first step.

    Args:
        outer: the outer model.
        call: keyword arguments of its call.
        placeholders: image placeholders in its prompt.

    Returns:
        The keyword arguments with encoded images in place of pixels (next to pixels, if the model cannot
        take them encoded), and the visual tokens of each encoded entry in the order of their placeholders.
    """
    encoded = _encoded(outer, call)
    if encoded.get("image") is None:
        raise _no_images(placeholders)
    replaced = _PIXELS if takes_encoded(outer) else ()
    others = {name: value for name, value in call.items() if name not in replaced}
    return {**others, ENCODED: encoded}, _sizes(outer, encoded["image"])


def encoded_sizes(outer: nn.Module, call: Mapping[str, Any]) -> list[int]:
    """Return the visual tokens of each entry that the images of a call are encoded to."""
    return _sizes(outer, _encoded(outer, call)["image"])


def _sizes(outer: nn.Module, encoded: Any) -> list[int]:
    sizes = [len(entry) for entry in _entries(outer, encoded)]
    model: Any = outer
    if not family_of(model.config).rows:
        return sizes
    return [model.image_seq_len] * (sum(sizes) // model.image_seq_len)


def _encoded(outer: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return encoded images and videos by modality: those of the call, or its pixels encoded."""
    encoded = dict(call.get(ENCODED) or {})
    _refuse_slices(outer, encoded.get("image"))
    for modality in MODALITIES:
        encoder = encoder_of(outer, modality)
        if encoder is None or encoded.get(modality) is not None:
            continue
        inputs = {name: call[name] for name in inspect.signature(encoder).parameters if name in call}
        if _has_pixels(inputs):
            inputs = encoder_defaults(outer, encoder) | inputs
            _refuse_missing(encoder, inputs)
            _refuse_other_patches(encoder, inputs)
            encoded[modality] = encoder(**inputs, return_dict=True)
    return encoded


def _refuse_slices(outer: nn.Module, encoded: Any) -> None:
    """Reject images that ``generate(prefill_chunk_size=…)`` has cut into parts."""
    if isinstance(encoded, Mapping) and "pooler_output" in encoded and encoded.keys() <= _SLICED:
        raise InputError(
            f"encoded images hold {', '.join(encoded)} alone, as generate(prefill_chunk_size=…) cuts them: "
            "where an image begins and ends cannot be known. Leave out prefill_chunk_size, "
            f"or pass all that {type(outer).__name__}.get_image_features returns"
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
            f"{encoder.__qualname__} needs {', '.join(missing)} besides {', '.join(given)}: pass the "
            "processor's output unchanged"
        )


def _refuse_other_patches(encoder: Any, inputs: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the number of flattened patches matches the grids."""
    grid = next((value for name, value in inputs.items() if name.endswith(_GRID)), None)
    pixels = next((inputs[name] for name in _PIXELS if inputs.get(name) is not None), None)
    if grid is None or pixels is None:
        return
    expected = int(grid.prod(dim=-1).sum())
    if len(pixels) != expected:
        raise InputError(
            f"{encoder.__qualname__} got {len(pixels)} patches of pixels, but grids {grid.tolist()} for "
            f"{expected}: pass the processor's output unchanged"
        )


def _entries(outer: nn.Module, encoded: Any) -> Iterable[torch.Tensor]:
    """Return the visual tokens of each encoded image or tile."""
    features = model_output(encoded, "pooler_output")
    if features is None:
        features = model_output(encoded, "last_hidden_state")
    deep = model_output(encoded, "deepstack_features")
    if features is None and deep is not None:
        features = deep[0][1]  # of the first layer that adds some
    if features is None:
        raise UnsupportedModelError(
            f"{type(outer).__name__} encodes images to {', '.join(encoded)}, not to visual tokens of each "
            "image (pooler_output): what to select from cannot be known",
            "images are not encoded to one feature for each visual token",
        )
    model: Any = outer
    if isinstance(features, torch.Tensor) and features.ndim == 2 and family_of(model.config).one_a_row:
        return [features]
    if isinstance(features, torch.Tensor) and features.ndim == 2:
        raise UnsupportedModelError(
            f"{type(outer).__name__} encodes images to features of shape {tuple(features.shape)}: where one "
            "image ends and the next begins cannot be known",
            "encoded images are not separated",
        )
    return features


def brings_images(call: Mapping[str, Any]) -> bool:
    """Return whether a call has images, as pixels or encoded."""
    encoded = (call.get(ENCODED) or {}).get("image")
    return encoded is not None or _has_pixels(call, [name for name in _PIXELS if name not in _VIDEOS])


def skips_videos(call: Mapping[str, Any]) -> bool:
    """Return whether a call has videos, whose tokens are not reduced."""
    encoded = (call.get(ENCODED) or {}).get("video")
    return encoded is not None or _has_pixels(call, _VIDEOS)


def _has_pixels(call: Mapping[str, Any], names: Iterable[str] = _PIXELS) -> bool:
    return any(call.get(name) is not None and len(call[name]) for name in names)


def _no_images(placeholders: int) -> InputError:
    return InputError(
        f"input_ids hold {placeholders} image placeholders but neither pixel_values nor encoded images came "
        "with them: pass the processor's output unchanged, or a prompt without images"
    )
