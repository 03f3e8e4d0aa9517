"""Prompts as vLLM's own processor makes them, and the tokens of their images.

An image is processed once: its tokens are counted in what vLLM's processor returns.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from skipvision.engine import Request
from skipvision.errors import ConfigError, InputError, SkipVisionError
from skipvision.integrations.vllm.image_settings import FIELD, ImageSettings

_IMAGE = "image"
_REMEMBERED = 2**16
"""Images whose size is remembered; vLLM's cache of processed images forgets which it sent earlier."""


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of one image.

    Attributes:
        total: without pruning.
        kept: in the prompt, summary tokens included.
    """

    total: int
    kept: int


@dataclass(frozen=True)
class Rendered:
    """A prompt that vLLM can run.

    Attributes:
        inputs: vLLM's own form.
        skip: the plug-in's setting, as given to `Prompts.render`.
        submitted: when rendering began (`time.monotonic`).
        images: the tokens of each image.
        images_end: tokens up to the end of the last image; 0 without images.
    """

    inputs: dict[str, Any]
    skip: object
    submitted: float
    images: tuple[ImageTokens, ...] = ()
    images_end: int = 0

    def __len__(self) -> int:
        return len(self.inputs["prompt_token_ids"])

    @property
    def visual_total(self) -> int:
        return sum(image.total for image in self.images)

    @property
    def visual_kept(self) -> int:
        return sum(image.kept for image in self.images)


class Prompts:
    """Renders prompts for one engine of vLLM.

    Args:
        engine: vLLM's ``AsyncLLM``.
        processor: the model's Hugging Face processor.
    """

    def __init__(self, engine: Any, processor: Any) -> None:
        self._renderer = engine.renderer
        self._placeholder: str | None = getattr(processor, "image_token", None)
        self._begin: str | None = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
        self._totals: OrderedDict[str, int] = OrderedDict()

    async def render(self, request: Request, skip: object = None) -> Rendered:
        """Tokenize a rendered prompt, and process its images.

        Args:
            request: with the text of its prompt.
            skip: the plug-in's setting for this request; None = that of the server.

        Raises:
            SkipVisionError: the request is invalid, or vLLM refuses it.
        """
        submitted, prompt = time.monotonic(), self._prompt(request)
        if skip is not None and request.images:
            prompt["mm_processor_kwargs"] = {"skip": skip}
        inputs = await self._processed(prompt)
        if not request.images:
            return Rendered(inputs, skip, submitted)
        found = inputs["mm_placeholders"][_IMAGE]
        kept = [place.get_num_embeds() for place in found]
        totals = self._known_totals(inputs, kept)
        if None in totals:
            # vLLM has sent this image to its engine before, and holds no more than its hash.
            again = await self._processed(prompt, skip_mm_cache=True)
            totals = self._known_totals(again, kept)
        images = [ImageTokens(total or 0, stays) for total, stays in zip(totals, kept, strict=True)]
        end = max(place.offset + place.length for place in found)
        return Rendered(inputs, skip, submitted, tuple(images), end)

    def _prompt(self, request: Request) -> dict[str, Any]:
        images = list(request.images)
        if request.inputs is not None or not isinstance(request.prompt, str):
            raise ConfigError("vLLM takes the text of a prompt and its images, not messages or tensors")
        if self._placeholder and (found := request.prompt.count(self._placeholder)) != len(images):
            raise InputError(
                f"the prompt has {found} placeholders {self._placeholder} for {len(images)} images: "
                "give one for each"
            )
        return {"prompt": request.prompt, **({"multi_modal_data": {_IMAGE: images}} if images else {})}

    async def _processed(self, prompt: dict[str, Any], *, skip_mm_cache: bool = False) -> dict[str, Any]:
        begins = self._begin is not None and prompt["prompt"].startswith(self._begin)
        # Without a limit: vLLM checks the length again once images have been pruned.
        parameters = replace(
            self._renderer.default_cmpl_tok_params, add_special_tokens=not begins, max_total_tokens=None
        )
        try:
            (inputs,) = await self._renderer.render_cmpl_async(
                [dict(prompt)], parameters, skip_mm_cache=skip_mm_cache
            )
        except (SkipVisionError, asyncio.CancelledError):
            raise
        except Exception as error:  # of processors and of vLLM; other requests continue
            raise InputError(f"vLLM refuses this request ({type(error).__name__}): {error}") from error
        found: dict[str, Any] = inputs
        return found

    def _known_totals(self, inputs: dict[str, Any], kept: Sequence[int]) -> list[int | None]:
        """Return the tokens of each image without pruning; None where it must be processed again."""
        totals: list[int | None] = []
        items, hashes = inputs["mm_kwargs"][_IMAGE], inputs["mm_hashes"][_IMAGE]
        for item, key, stays in zip(items, hashes, kept, strict=True):
            if item is not None:
                # Without the plug-in no image is pruned.
                pruned = FIELD in item
                total = ImageSettings.from_tensor(item[FIELD].data).tokens if pruned else stays
                self._totals[key] = total
            if key in self._totals:
                self._totals.move_to_end(key)
            totals.append(self._totals.get(key))
        while len(self._totals) > _REMEMBERED:
            self._totals.popitem(last=False)
        return totals
