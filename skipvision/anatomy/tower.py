"""Attention that patches receive in the vision tower, passed on with the encoded images.

`generate` encodes images before Skip-Vision sees them. So the attention travels in the tower's output, which
a family turns into its encoded images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from skipvision._compat import ENCODED, submodules
from skipvision.anatomy.attention import check_readable, read
from skipvision.anatomy.families import Anatomy
from skipvision.anatomy.images import Images
from skipvision.errors import InputError, UnsupportedModelError

_RECEIVED = "skip_vision_received"
_CLASS_TOKENS = ("class_embedding", "cls_token")
_last = threading.local()


def hook_tower(anatomy: Anatomy, wanted: Callable[[], bool]) -> list[RemovableHandle]:
    """Read attention in the layer that produces the features, in calls for which it is wanted.

    As VisionZip (CVPR 2025, arXiv 2412.04467) scores patches: by the class token's attention, or by the mean
    over all patches' attention in a tower without class token.

    Raises:
        UnsupportedModelError: no such layer exists, or its attention cannot be read.
    """
    tower = _tower(anatomy)
    attention = _attention(tower, anatomy)
    own = any(name.endswith(_CLASS_TOKENS) for name, _ in tower.named_parameters())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wanted():
            attended = read(module, args, kwargs)
            rows, _, tokens, _ = attended.query.shape
            place = torch.arange(tokens, device=attended.query.device).expand(rows, tokens)
            queries = place[:, :1] if own else place
            _last.received = attended.received(queries)[:, int(own) :]

    def hand_on(tower: nn.Module, args: Any, output: Any) -> None:
        if wanted():
            output[_RECEIVED] = vars(_last).pop("received")

    return [
        attention.register_forward_pre_hook(note, with_kwargs=True),
        tower.register_forward_hook(hand_on),
    ]


def received(call: Mapping[str, Any], images: Images, setting: str) -> torch.Tensor:
    """(I, N) attention read while the images of an outer call were encoded; ``setting`` needs it.

    Raises:
        InputError: the encoded images came without it.
    """
    encoded = (call.get(ENCODED) or {}).get("image")
    scores: torch.Tensor | None = None if encoded is None else encoded.get(_RECEIVED)
    if scores is None:
        raise InputError(
            "encoded images came without the vision tower's attention: encode them while Skip-Vision is "
            f"attached with {setting}, or choose another select"
        )
    if len(scores) == len(images.row):
        return scores
    # With beams, ``generate`` repeats rows and their encoded images, but not this attention.
    beams = len(images.row) // len(scores)
    first = torch.searchsorted(images.row, images.row)
    nth = torch.arange(len(images.row), device=images.row.device) - first
    same = torch.searchsorted(images.row, images.row // beams * beams)
    return scores[same // beams + nth]


def _tower(anatomy: Anatomy) -> nn.Module:
    parts = submodules(anatomy.outer)
    tower = next((parts[name] for name in _TOWERS if name in parts), None)
    if tower is None:
        raise UnsupportedModelError(
            f"{type(anatomy.outer).__name__} has none of {', '.join(_TOWERS)}: its vision tower is unknown",
            "no vision tower module",
        )
    return tower


_TOWERS = ("vision_tower", "vision_model", "visual")


def _attention(tower: nn.Module, anatomy: Anatomy) -> nn.Module:
    """Return the attention of the layer whose output becomes the visual features; of several, the last."""
    lists = (module for module in tower.modules() if isinstance(module, nn.ModuleList))
    layers = [layer for layer in max(lists, key=len, default=[]) if "self_attn" in submodules(layer)]
    chosen = getattr(anatomy.outer.config, "vision_feature_layer", -1)
    # Hidden states are numbered from the input of the first layer.
    places = [n - 1 if n > 0 else len(layers) + n for n in ([chosen] if isinstance(chosen, int) else chosen)]
    if not layers or not 0 <= max(places) < len(layers):
        raise UnsupportedModelError(
            f"{type(tower).__name__} has {len(layers)} layers with self_attn, features come from layer "
            f"{chosen}: where to read its attention is unknown",
            "no layers of self-attention in the vision tower",
        )
    attention: Any = layers[max(places)].self_attn
    check_readable(attention)
    return attention
