"""DeepStack: further features that a decoder adds to visual tokens before some of its layers.

Families pass them to the decoder in two forms: ``visual_pos_masks`` (B, T) with a list of features for the
first layers, or ``vision_mask`` (B, T, 1) with a dictionary of features by layer. Features are (n, H) for the
n True entries of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_OF_FIRST_LAYERS = ("visual_pos_masks", "deepstack_visual_embeds")
_BY_LAYER = ("vision_mask", "deepstack_features")
KEYWORDS = (_OF_FIRST_LAYERS[1], _BY_LAYER[1])
"""The decoder's keywords for the features."""


@dataclass(frozen=True, eq=False)
class DeepStack:
    """The DeepStack features of one call.

    Attributes:
        visual: (B, T) tokens that have features.
        layers: numbers of the layers that add some; None for the first layers.
        features: (n, H) for each of these layers.
    """

    visual: torch.Tensor
    layers: list[int] | None
    features: list[torch.Tensor]

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> DeepStack | None:
        """Return the features among a decoder's keyword arguments, or None."""
        mask, features = (call.get(name) for name in _OF_FIRST_LAYERS)
        if mask is not None and features is not None:
            return cls(mask, None, list(features))
        mask, features = (call.get(name) for name in _BY_LAYER)
        if mask is not None and features is not None:
            return cls(mask[..., 0], list(features), list(features.values()))
        return None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that pass these features."""
        if self.layers is None:
            return dict(zip(_OF_FIRST_LAYERS, (self.visual, self.features), strict=True))
        by_layer = dict(zip(self.layers, self.features, strict=True))
        return dict(zip(_BY_LAYER, (self.visual[..., None], by_layer), strict=True))


def with_first_features(decoder: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return a decoder's keyword arguments with the features of layer 0 in the embeddings.

    Some families leave embeddings of visual tokens at zero and add their features before layer 0. Selection,
    merging and summaries need them in the embeddings.
    """
    deep = DeepStack.of(call)
    if deep is None or deep.layers is None or 0 not in deep.layers:
        return call
    first = deep.layers.index(0)
    embeds, added = call["inputs_embeds"], deep.features[first] / getattr(decoder, "embedding_multiplier", 1)
    whole = torch.zeros_like(embeds).index_put((deep.visual,), added.to(embeds))
    rest = DeepStack(
        deep.visual,
        [number for number in deep.layers if number],
        [each for number, each in zip(deep.layers, deep.features, strict=True) if number],
    )
    return {**call, **rest.arguments(), "inputs_embeds": embeds + whole}
