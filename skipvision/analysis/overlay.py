"""The overlay: a plan shown on its image."""

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
    """The fate of each patch of one image.

    Attributes:
        size: width and height of the image, in pixels.
        views: grids of patches over the image, in the order of their tokens; each tile is a view.
        patches: one for each visual token, in the order of the prompt.
        drop_after: decoder layer after which only the summaries of these tokens are left; None = all are.
    """

    size: Size
    views: tuple[View, ...]
    patches: tuple[Patch, ...]
    drop_after: int | None = None

    @property
    def counts(self) -> dict[Fate, int]:
        """Number of visual tokens by fate."""
        found = Counter(patch.fate for patch in self.patches)
        every: tuple[Fate, ...] = ("retained", "skipped", "merged", "dropped")
        return {fate: found[fate] for fate in every}

    def as_json(self) -> dict[str, Any]:
        """Return the overlay for ``json.dumps``; boxes are [left, top, right, bottom] in pixels."""
        return {
            "size": list(self.size),
            "views": [asdict(view) | {"box": list(view.box)} for view in self.views],
            "patches": [
                asdict(patch) | {"box": None if patch.box is None else list(patch.box)}
                for patch in self.patches
            ],
            **({} if self.drop_after is None else {"drop_after": self.drop_after}),
        }

    def draw(self, image: Image.Image, side: int = 896) -> Image.Image:
        """Draw the patches over the image, with a legend. Overlapping views get a panel each.

        Args:
            image: the image that the processor received.
            side: longer side of each panel, in pixels.

        Raises:
            InputError: the image has another size than the overlay, or ``side`` is not positive.
        """
        if image.size != self.size:
            raise InputError(f"the image has {image.size} pixels, but the overlay is for {self.size}")
        if side < 1:
            raise InputError(f"side={side}: expected at least one pixel")
        return paint(image, self.views, self.patches, self.counts, side, self.drop_after)


def patches_of(
    plan: TokenPlan,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[Size],
    processor: Any,
    config: PretrainedConfig,
) -> tuple[Overlay, ...]:
    """Return the overlay of each image of a batch, in the order of the prompts.

    Args:
        plan: plan of the batch: ``skip.plan`` after a call of an attached model.
        inputs: inputs of that call: ``input_ids`` (B, T), pixels, and other outputs of the processor.
        sizes: width and height of the images that the processor received (``image.size``).
        processor: the model's processor, or its image processor.
        config: config of the model.

    Raises:
        UnsupportedModelError: the pixels of each visual token are not known for this family.
        InputError: the inputs do not belong to these images or this plan.
    """
    ids = inputs["input_ids"]
    if ids.shape != plan.merged_into.shape:
        raise InputError(
            f"input_ids are {tuple(ids.shape)}, but the plan is for {tuple(plan.merged_into.shape)}: pass "
            "the inputs of the call that produced the plan"
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
            None if plan.drop is None else plan.drop.after,
        )
        for size, image, tokens in zip(sizes, views, found, strict=True)
    )
