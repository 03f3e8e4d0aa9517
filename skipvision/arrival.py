"""Finds the images in a call of the outer model and reads what the criterion needs.

What the decoder's hook must know travels with the call, as a keyword that the model passes on to its decoder.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from skipvision.anatomy import positions
from skipvision.anatomy.checks import check_mask, refuse_packed
from skipvision.anatomy.encoding import brings_images, skips_videos
from skipvision.anatomy.families import Anatomy, base_view, check_patches
from skipvision.anatomy.images import Images
from skipvision.anatomy.tower import received
from skipvision.config import SkipConfig
from skipvision.errors import InputError
from skipvision.kv_cache import CacheState, SettledCache, check_prunable

ARRIVAL = "skip_vision_arrival"
"""Keyword of the decoder's call that holds the `Arrival`."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """The values that the outer hook passes to the decoder's hook.

    Attributes:
        mask: the caller's mask (B, C + T) over the cache and this call; None if there is none.
        images: the images of this call; None if there are none.
        reading: (I, N) what the criterion reads from views or vision tower; None for other criteria.
    """

    mask: torch.Tensor | None
    images: Images | None
    reading: torch.Tensor | None = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_placeholders(call: dict[str, Any], image_token_id: int) -> torch.Tensor | None:
    """Return the (B, T) mask of image placeholders in an outer call, or None if it has no images.

    Raises:
        InputError: the call has embeddings without ids, or images without placeholders.
    """
    input_ids, cache = call.get("input_ids"), call.get("past_key_values")
    if isinstance(cache, SettledCache):
        return None
    if skips_videos(call):
        warnings.warn("videos are not reduced: they pass Skip-Vision in full", stacklevel=2)
    if input_ids is None:
        embeds = call.get("inputs_embeds")
        if embeds is not None and embeds.shape[1] > 1:
            raise InputError(
                f"inputs_embeds without input_ids, of shape {tuple(embeds.shape)}: which positions are "
                "visual cannot be known. Pass input_ids (and pixel_values), or detach() for this call"
            )
        return None
    visual: torch.Tensor = input_ids == image_token_id
    if not bool(visual.any()):
        if brings_images(call):
            raise InputError(
                f"images came with input_ids of shape {tuple(input_ids.shape)} that hold no placeholder "
                f"({image_token_id}): build both with one processor call, or leave the images out"
            )
        return None
    filled = cache is not None and cache.get_seq_length() > 0
    # Without images on a filled cache, a placeholder is a sampled word.
    return visual if brings_images(call) or not filled else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def check_cache(call: dict[str, Any], config: SkipConfig) -> None:
    """Raise `UnsupportedModelError` if the cache of a call with images cannot be pruned.

    If nothing is skipped, only the caches are refused for which transformers makes masks of another form.
    """
    cache, mask = call.get("past_key_values"), call.get("attention_mask")
    of_tokens = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
    if cache is not None and not (config.is_full and of_tokens):
        check_prunable(cache)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def announce(
    call: dict[str, Any], visual: torch.Tensor | None, sizes: list[int], anatomy: Anatomy, config: SkipConfig
) -> dict[str, Any] | None:
    """Return an outer call's keyword arguments with its `Arrival`, or None to leave the call unchanged.

    Args:
        call: keyword arguments, images encoded.
        visual: (B, T) image placeholders; None without images.
        sizes: visual tokens of each encoded entry.
        anatomy: of the model.
        config: applied to the call.
    """
    state = CacheState.of(call.get("past_key_values"))
    if visual is None and state is None:
        return None
    images = reading = None
    if visual is not None:
        if state is None:
            check_mask(call.get("attention_mask"), visual.shape, call.get("past_key_values"))
        refuse_packed(call)
        if anatomy.family.one_a_row and sum(sizes) == int(visual.sum()):
            sizes = [size for size in visual.sum(dim=1).tolist() if size]
        images = Images.locate(visual, sizes, anatomy.family.tiles)
        if config.criterion.needs_patches or config.merging.needs_patches:
            check_patches(anatomy, sizes)
        if config.criterion.reads == "views":
            reading = base_view(anatomy, images, sizes)
        elif config.criterion.reads == "tower":
            reading = received(call, images, config.criterion.setting)
    if state is not None:
        call = _on_pruned_cache(call, state, images is not None)
    return {**call, ARRIVAL: Arrival(call.get("attention_mask"), images, reading)}


def _on_pruned_cache(call: dict[str, Any], state: CacheState, images: bool) -> dict[str, Any]:
    """Translate a call's mask and positions from the caller's sequence to a pruned cache."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    cached, new = call["past_key_values"].get_seq_length(), tokens.shape[1]
    mask = state.extended_mask(cached, new, call.get("attention_mask"))
    given = call.get("position_ids")
    if given is not None:
        shift = positions.of_axes(state.shift, len(given) if given.ndim == 3 else 1)
        own = given - (shift if given.ndim == 3 else shift[0])[..., None]
    elif images and len(state.next_position) > 1:
        raise InputError(
            "images after a pruned cache need position_ids in this family: their positions have three axes "
            "and begin where the text before them ended"
        )
    else:
        later = torch.arange(new, device=mask.device) + cached - state.mask.shape[1]
        own = state.next_position[..., None] + later
        own = own if len(own) > 1 else own[0]
    return {**call, "attention_mask": mask, "position_ids": own}
