"""The overlay: a plan seen on the image it was made for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig

from skipvision.analysis.geometry import Size, View, views_of
from skipvision.analysis.painting import paint
from skipvision.analysis.patches import Fate, Patch, fates
from skipvision.errors import InputError
from skipvision.plan import TokenPlan


@dataclass(frozen=True)
class Overlay:
    """What becomes of each patch of one image.

    Attributes:
        size: width and height of the image, in pixels.
        views: the grids of patches over it, in the order of their tokens; tiles each have their own.
        patches: every visual token, in the order in which they stand in the prompt.
    """

    size: Size
    views: tuple[View, ...]
    patches: tuple[Patch, ...]

    @property
    def counts(self) -> dict[Fate, int]:
        """How many visual tokens have each fate."""
        found = Counter(patch.fate for patch in self.patches)
        every: tuple[Fate, ...] = ("retained", "skipped", "merged", "dropped")
        return {fate: found[fate] for fate in every}

    def as_json(self) -> dict[str, Any]:
        """Itself in what ``json.dumps`` takes; boxes are [left, top, right, bottom] in pixels."""
        return {
            "size": list(self.size),
            "views": [asdict(view) | {"box": list(view.box)} for view in self.views],
            "patches": [
                asdict(patch) | {"box": None if patch.box is None else list(patch.box)}
                for patch in self.patches
            ],
        }

    def draw(self, image: Image.Image, side: int = 896) -> Image.Image:
        """The image with its patches marked, and a legend; views that overlap are drawn side by side.

        Args:
            image: the one that the processor was given.
            side: pixels of the longer side of each panel.

        Raises:
            InputError: the image is of another size, or ``side`` is not positive.
        """
        if image.size != self.size:
            raise InputError(f"the image is of {image.size} pixels, the overlay for one of {self.size}")
        if side < 1:
            raise InputError(f"side={side}: a picture has at least one pixel")
        return paint(image, self.views, self.patches, self.counts, side)


def patches_of(
    plan: TokenPlan,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[Size],
    processor: Any,
    config: PretrainedConfig,
) -> tuple[Overlay, ...]:
    """The overlay of each image of a batch, in the order of the prompts.

    Args:
        plan: of the batch; ``skip.plan`` behind a call of an attached model.
        inputs: the call's ``input_ids`` (B, T), pixels and what the processor put beside them.
        sizes: width and height of the images that the processor was given (``image.size``).
        processor: the model's processor, or its image processor.
        config: of the model.

    Raises:
        UnsupportedModelError: how the family cuts images is not known.
        InputError: the inputs do not belong to these images or this plan.
    """
    ids = inputs["input_ids"]
    if ids.shape != plan.merged_into.shape:
        raise InputError(
            f"input_ids are {tuple(ids.shape)}, the plan is of {tuple(plan.merged_into.shape)}: pass the "
            "inputs of the call that the plan was made in"
        )
    visual = (ids == config.image_token_id).to(plan.merged_into.device)
    views = views_of(config, processor, inputs, sizes, int(visual.sum()))
    found = fates(plan, visual, [sum(view.tokens for view in image) for image in views])
    return tuple(
        Overlay(
            size,
            image,
            tuple(
                Patch(fate, into, box)
                for (fate, into), box in zip(
                    tokens, (box for view in image for box in view.boxes(size)), strict=True
                )
            ),
        )
        for size, image, tokens in zip(sizes, views, found, strict=True)
    )
