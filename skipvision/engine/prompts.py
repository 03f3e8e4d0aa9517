"""From a request to tensors, and from the tensors of several requests to one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from skipvision.config import SkipConfig
from skipvision.engine.requests import Inputs, Request
from skipvision.errors import InputError

_IDS = "input_ids"
_MASK = "attention_mask"


def prepare(processor: Any, request: Request) -> Request:
    """Do what needs no model: template, tokenizer and image processor. Any process can do it.

    Returns:
        The request with ``inputs``, on the CPU; its own if it has some already.

    Raises:
        InputError: the processor refuses the prompt or an image.
    """
    if request.inputs is not None:
        return request
    try:
        text, special = request.prompt, {}
        if not isinstance(text, str):
            text = processor.apply_chat_template(list(text), add_generation_prompt=True, tokenize=False)
            begin = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
            if begin and text.startswith(begin):
                special = {"add_special_tokens": False}
        pictures = {"images": list(request.images)} if request.images else {}
        inputs = processor(text=[text], return_tensors="pt", **pictures, **special)
    except Exception as error:
        raise InputError(f"the processor refuses this request ({type(error).__name__}): {error}") from error
    return replace(request, inputs=dict(inputs))


class Prompt:
    """The prepared prompt of one request.

    Args:
        inputs: what the processor made of it, one row.
        image_token_id: placeholder token of one visual token.
        pictures: how many images it was made from; 0 = not known.

    Raises:
        InputError: there are no ids, or not of one row.
    """

    def __init__(self, inputs: Inputs, image_token_id: int, pictures: int = 0) -> None:
        ids = inputs.get(_IDS)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise InputError(f"input_ids are {shape}: one row, (1, T), of at least one token is expected")
        mask = inputs.get(_MASK)
        if mask is not None and not bool(mask.all()):
            raise InputError("attention_mask of a request has zeros: prepare each request without padding")
        self.inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.ids: list[int] = ids[0].tolist()
        self._image_token_id, self._pictures = image_token_id, pictures

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def image_sizes(self) -> list[int]:
        """Visual tokens of each image, as far as the prompt tells.

        Placeholders side by side are taken for one image, or for several of one size where it is known
        that there are more images. `Usage` counts what was really there.
        """
        runs = [
            len(list(run))
            for placeholder, run in groupby(self.ids, self._image_token_id.__eq__)
            if placeholder
        ]
        each, rest = divmod(sum(runs), max(self._pictures, 1))
        if len(runs) < self._pictures and not rest:
            return [each] * self._pictures
        return runs

    def planned_entries(self, config: SkipConfig) -> int:
        """Entries of the KV cache that the prompt will keep under a config."""
        sizes = self.image_sizes
        return len(self) - sum(sizes) + sum(_kept(config, size) for size in sizes)

    @cached_property
    def prefix_length(self) -> int:
        """Tokens up to and with the last image; 0 without images or with nothing behind them."""
        if self._image_token_id not in self.ids:
            return 0
        end = len(self) - self.ids[::-1].index(self._image_token_id)
        return end if end < len(self) else 0

    @cached_property
    def prefix_digest(self) -> str:
        """Hash of the tokens of the prefix and of all pixels."""
        digest = hashlib.blake2b(repr(self.ids[: self.prefix_length]).encode(), digest_size=20)
        for name, value in sorted(self.inputs.items()):
            if not self._by_token(value):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def by_token(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The inputs that say something of each token, (1, T, …)."""
        return ((name, value) for name, value in self.inputs.items() if self._by_token(value))

    def by_image(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The others."""
        return ((name, value) for name, value in self.inputs.items() if not self._by_token(value))

    def _by_token(self, value: torch.Tensor) -> bool:
        return value.shape[:2] == (1, len(self))


def collate(
    prompts: Sequence[Prompt], pad_token_id: int, begin: Sequence[int] | None = None
) -> dict[str, Any]:
    """One batch of several prompts, padded on the left.

    Args:
        prompts: one a row.
        pad_token_id: what stands where there is nothing.
        begin: leave out each prompt's tokens before this, and its images.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T) and what else the prompts have. Pixel tensors are put one
        behind the other, smaller ones padded with zeros, as processors do it.
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
    return {**batch, **{name: _stacked(values) for name, values in pixels.items()}}


def _kept(config: SkipConfig, size: int) -> int:
    retained, skipped = config.counts(size)
    summaries = config.summary_tokens * ((retained > 0) + (skipped > 0))
    return retained + summaries + (0 if config.skip_kv else skipped)


def _padded_left(
    value: torch.Tensor | None, example: torch.Tensor, length: int, padding: int
) -> torch.Tensor:
    whole = example.new_full((1, length, *example.shape[2:]), padding)
    if value is not None and value.shape[1]:
        whole[:, length - value.shape[1] :] = value
    return whole


def _stacked(values: list[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    return torch.cat([_filled_up(value, shape) for value in values])


def _filled_up(value: torch.Tensor, shape: list[int]) -> torch.Tensor:
    missing = [wanted - there for wanted, there in zip(shape, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    # F.pad counts from the last dimension.
    return F.pad(value, [amount for size in reversed(missing) for amount in (0, size)])
