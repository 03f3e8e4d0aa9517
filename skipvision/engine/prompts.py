"""Prepare a request's tensors, and collate those of several requests into one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from skipvision._compat import is_panic
from skipvision.config import SkipConfig
from skipvision.engine.requests import Inputs, Request
from skipvision.errors import InputError

_IDS = "input_ids"
_MASK = "attention_mask"


def prepare(processor: Any, request: Request, rendered: str | None = None) -> Request:
    """Apply chat template, tokenizer and image processor. No model is needed, so any process can do it.

    Args:
        processor: the model's processor.
        request: a request with a prompt and images.
        rendered: the text that the chat template has made of the prompt's messages; None = apply it here.

    Returns:
        The request with ``inputs`` on the CPU. A request that already has inputs is returned unchanged.

    Raises:
        InputError: the processor rejects the prompt or an image.
    """
    if request.inputs is not None:
        return request
    try:
        text: str | None
        special: dict[str, bool] = {}
        if isinstance(request.prompt, str):
            text = request.prompt
        else:
            text = rendered
            if text is None:
                messages = list(request.prompt)
                text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            begin = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
            if begin and text.startswith(begin):
                special = {"add_special_tokens": False}
        images = {"images": list(request.images)} if request.images else {}
        inputs = processor(text=[text], return_tensors="pt", **images, **special)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise InputError(f"the processor rejects this request ({type(error).__name__}): {error}") from error
    return replace(request, inputs=dict(inputs))


class Prompt:
    """The prepared prompt of one request.

    Args:
        inputs: the processor's output for one prompt.
        image_token_id: placeholder token of one visual token.
        images: number of images in the prompt; 0 = unknown.

    Raises:
        InputError: input_ids are missing or not a single unpadded row.
    """

    def __init__(self, inputs: Inputs, image_token_id: int, images: int = 0) -> None:
        ids = inputs.get(_IDS)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise InputError(f"input_ids are {shape}: expected one row, (1, T), of at least one token")
        mask = inputs.get(_MASK)
        if mask is not None and not bool(mask.all()):
            raise InputError("attention_mask has zeros: prepare each request without padding")
        self.inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.ids: list[int] = ids[0].tolist()
        self._image_token_id, self._images = image_token_id, images

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def image_sizes(self) -> list[int]:
        """Visual tokens of each image, estimated from the placeholders.

        A run of placeholders counts as one image. If the prompt has more images than runs, all images are
        assumed to have the same size. `Usage` reports the exact counts after prefill.
        """
        runs = [
            len(list(run))
            for placeholder, run in groupby(self.ids, self._image_token_id.__eq__)
            if placeholder
        ]
        each, rest = divmod(sum(runs), max(self._images, 1))
        if len(runs) < self._images and not rest:
            return [each] * self._images
        return runs

    def planned_entries(self, config: SkipConfig) -> int:
        """KV cache entries that the prompt will keep under a config, by `image_sizes`."""
        sizes = self.image_sizes
        return len(self) - sum(sizes) + sum(config.cached(size) for size in sizes)

    @cached_property
    def prefix_length(self) -> int:
        """Tokens up to the end of the last image; 0 without images, or if no token follows them."""
        if self._image_token_id not in self.ids:
            return 0
        end = len(self) - self.ids[::-1].index(self._image_token_id)
        return end if end < len(self) else 0

    @cached_property
    def prefix_digest(self) -> str:
        """Hash of the prefix's tokens and of all pixels."""
        digest = hashlib.blake2b(repr(self.ids[: self.prefix_length]).encode(), digest_size=20)
        for name, value in sorted(self.inputs.items()):
            if not self._is_by_token(value):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def by_token(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the inputs with an element for each token, (1, T, …), by name."""
        return ((name, value) for name, value in self.inputs.items() if self._is_by_token(value))

    def by_image(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the other inputs, such as pixels, by name."""
        return ((name, value) for name, value in self.inputs.items() if not self._is_by_token(value))

    def _is_by_token(self, value: torch.Tensor) -> bool:
        return value.shape[:2] == (1, len(self))


def collate(
    prompts: Sequence[Prompt], pad_token_id: int, begin: Sequence[int] | None = None
) -> dict[str, Any]:
    """Collate several prompts into one batch, padded on the left.

    Args:
        prompts: one for each row.
        pad_token_id: id of padding.
        begin: index of each prompt's first token in the batch; images are then left out.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T), and the prompts' other inputs. Pixel tensors are
        concatenated, the smaller ones padded with zeros, as processors do.
    """
    starts = begin or [0] * len(prompts)
    length = max(len(prompt) - start for prompt, start in zip(prompts, starts, strict=True))
    rows: dict[str, list[torch.Tensor | None]] = {_MASK: [None] * len(prompts)}
    pixels: dict[str, list[torch.Tensor]] = {}
    for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        for name, value in prompt.by_token():
            rows.setdefault(name, [None] * len(prompts))[row] = value[:, start:]
        rows[_MASK][row] = torch.ones(1, len(prompt) - start, dtype=torch.long)
        for name, value in prompt.by_image() if begin is None else ():
            pixels.setdefault(name, []).append(value)
    batch: dict[str, Any] = {}
    for name, values in rows.items():
        example = next(value for value in values if value is not None)
        padding = pad_token_id if name == _IDS else 0
        batch[name] = torch.cat([_padded_left(value, example, length, padding) for value in values])
    return {**batch, **{name: _concatenated(values) for name, values in pixels.items()}}


def _padded_left(
    value: torch.Tensor | None, example: torch.Tensor, length: int, padding: int
) -> torch.Tensor:
    padded = example.new_full((1, length, *example.shape[2:]), padding)
    if value is not None and value.shape[1]:
        padded[:, length - value.shape[1] :] = value
    return padded


def _concatenated(values: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    return torch.cat([_padded_right(value, shape) for value in values])


def _padded_right(value: torch.Tensor, shape: list[int]) -> torch.Tensor:
    missing = [target - size for target, size in zip(shape, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    # F.pad counts from the last dimension.
    return F.pad(value, [amount for size in reversed(missing) for amount in (0, size)])
