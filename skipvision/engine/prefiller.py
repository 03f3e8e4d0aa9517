"""The model call that prefills several prompts, and the resulting KV cache.

Skipped tokens stay in this temporary cache until the call ends. The engine then copies the entries that stay
into its slots, and whole prefixes, skipped tokens included, into the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from skipvision._compat_generation import generation_position_ids
from skipvision.anatomy.cache_layers import Entries, entries_of, set_entries
from skipvision.anatomy.masks import token_indices
from skipvision.anatomy.positions import ends
from skipvision.attach import Attachment
from skipvision.config import SkipConfig
from skipvision.engine.prompts import Prompt, collate
from skipvision.engine.states import States, states_of
from skipvision.kv_cache import CacheState, LaterEntries, keep_everything
from skipvision.plan import TokenRole


@dataclass(frozen=True)
class Visual:
    """Counts of one prompt's visual tokens: in all, on the full path, on the short path, and in the cache."""

    total: int = 0
    retained: int = 0
    skipped: int = 0
    cached: int = 0


@dataclass(frozen=True, eq=False)
class Prefix:
    """KV cache of one prompt up to its last image, skipped tokens included: C entries.

    Attributes:
        layers: (heads, C, dim) entries of each layer that has some, by its number and by field.
        stay: (C,) True for entries that stay after prefill.
        ordinal: (C,) index of each entry among the caller's tokens.
        next_position: (A,) position of the token after it, on each of the model's position axes.
        fed: number of the caller's tokens.
        visual: counts of visual tokens.
        sizes: (C,) tokens that attention counts each entry as; None = one each.
    """

    layers: Entries
    stay: torch.Tensor
    ordinal: torch.Tensor
    next_position: torch.Tensor
    fed: int
    visual: Visual
    sizes: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the entries of all layers."""
        return sum(states.nbytes for fields in self.layers.values() for states in fields.values())


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch of B prompts in the model's KV cache, C entries a row.

    Attributes:
        layers: (B, heads, C, dim) entries of each layer that has some, by its number and by field.
        states: states of the recurrent layers.
        real: (B, C) False for padding.
        stay: (B, C) True for entries that stay after prefill.
        ordinal: (B, C) index of each entry among the caller's tokens.
        fed: (B,) number of the caller's tokens.
        next_position: (A, B) position of the next token, on each of the model's position axes.
        logits: (B, V) of the next token.
        visual: counts of visual tokens, by row.
        positions: (A, B, T) positions of the caller's tokens, valid after the images; None if the batch
            started from cached prefixes.
        later: entries of the layers that lack some; None = no layer does.
        sizes: (B, C) tokens that attention counts each entry as; None = one each.
    """

    layers: Entries
    states: States
    real: torch.Tensor
    stay: torch.Tensor
    ordinal: torch.Tensor
    fed: torch.Tensor
    next_position: torch.Tensor
    logits: torch.Tensor
    visual: list[Visual]
    positions: torch.Tensor | None = None
    later: LaterEntries | None = None
    sizes: torch.Tensor | None = None

    def staying(self) -> tuple[torch.Tensor, list[int]]:
        """Return the indices of the entries that stay, (B, K), and their number in each row.

        A row with fewer than K repeats its first entry. Padding would not do: it may hold NaN.
        """
        return _in_front(self.stay)

    def staying_later(self) -> tuple[int, torch.Tensor, torch.Tensor, list[int]] | None:
        """Return the same after `LaterEntries.after`: that layer, indices, ordinals, and numbers."""
        if self.later is None:
            return None
        after, into, real = self.later
        index, counts = _in_front(real)
        ordinals = torch.take_along_dim(self.ordinal, torch.take_along_dim(into, index, dim=1), dim=1)
        return after, index, ordinals, counts

    def prefix(self, row: int, tokens: int) -> Prefix:
        """Copy the entries of a row's first ``tokens`` tokens, which must include its last image."""
        if self.positions is None:
            raise ValueError("a batch that started from cached prefixes has no prefix of its own")
        padding = self.positions.shape[2] - int(self.fed[row])
        index = (self.real[row] & (self.ordinal[row] < tokens)).nonzero().squeeze(1)
        return Prefix(
            {
                number: {name: states[row].index_select(1, index) for name, states in fields.items()}
                for number, fields in self.layers.items()
            },
            self.stay[row, index],
            self.ordinal[row, index],
            self.positions[:, row, padding + tokens].clone(),
            tokens,
            self.visual[row],
            None if self.sizes is None else self.sizes[row, index],
        )


class Prefiller:
    """Runs batches of prompts through the model.

    Args:
        model: without a PEFT wrapper.
        attachment: Skip-Vision on that model; applies a request's SkipConfig.
        image_token_id: placeholder token of one visual token.
        text_config: the decoder's, which decides the layers of its cache.
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, image_token_id: int, text_config: Any
    ) -> None:
        self._model: Any = model
        self._attachment, self._image_token_id = attachment, image_token_id
        self._text_config = text_config
        pad = getattr(model.generation_config, "pad_token_id", None)
        self._pad = pad if pad is not None else 0

    def from_start(self, prompts: Sequence[Prompt], config: SkipConfig) -> Prefilled:
        """Prefill whole prompts with their images."""
        model, cache = self._model, DynamicCache(config=self._text_config)
        keep_everything(cache)
        batch = self._to_device(collate(prompts, self._pad))
        ids, mask = batch.pop("input_ids"), batch["attention_mask"]
        # `generate` calls the same two methods: they add the inputs that a family needs besides the prompt.
        positions = generation_position_ids(model, ids, {**batch, "past_key_values": cache})
        call = model.prepare_inputs_for_generation(
            ids,
            **{**batch, "position_ids": positions},
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            is_first_iteration=True,
        )
        attachment = self._attachment
        with attachment.using(config.model_copy(update={"skip_kv": False})):
            attachment.plan = None
            output = model(**call)
        visual = (ids == self._image_token_id).sum(dim=1).tolist()
        logits = output.logits[:, -1]
        state, plan = CacheState.of(cache), attachment.plan
        real = mask.bool()
        axes = positions.reshape(-1, *mask.shape)
        if state is None or plan is None:
            return Prefilled(
                _layers(cache), states_of(cache), real, real, token_indices(real), real.sum(dim=1),
                ends(positions, real), logits, [Visual(total, total, 0, total) for total in visual], axes,
            )  # fmt: skip
        roles = torch.full_like(state.token_index, TokenRole.PADDING)
        roles[state.mask] = plan.roles[plan.attention_mask].long()
        stay = state.mask & (roles != TokenRole.SKIPPED) if config.skip_kv else state.mask
        counts = torch.stack(
            [plan.count(role) for role in (TokenRole.RETAINED, TokenRole.SKIPPED)]
            + [(stay & (roles != TokenRole.TEXT)).sum(dim=1)],
            dim=1,
        ).tolist()
        return Prefilled(
            _layers(cache), states_of(cache), state.mask, stay, state.token_index, state.fed,
            state.next_position, logits,
            [Visual(total, *row) for total, row in zip(visual, counts, strict=True)],
            axes - state.shift[..., None], state.later, state.sizes,
        )  # fmt: skip

    def from_prefixes(self, prefixes: Sequence[Prefix], prompts: Sequence[Prompt]) -> Prefilled:
        """Prefill the rest of each prompt after its cached prefix. The rest has no images."""
        batch = self._to_device(collate(prompts, self._pad, begin=[prefix.fed for prefix in prefixes]))
        mask = batch["attention_mask"].bool()
        cache = DynamicCache(config=self._text_config)
        keep_everything(cache)
        for number, fields in prefixes[0].layers.items():
            joined = {
                name: _padded_left([one.layers[number][name].transpose(0, 1) for one in prefixes])
                for name in fields
            }
            set_entries(
                cache.layers[number], {name: states.transpose(1, 2) for name, states in joined.items()}
            )
        held = _padded_left([torch.ones_like(prefix.stay) for prefix in prefixes])
        next_position = torch.stack([prefix.next_position for prefix in prefixes], dim=1)
        state = CacheState(
            mask=held,
            caller_length=held.shape[1],
            shift=torch.zeros_like(next_position),
            next_position=next_position,
            token_index=_padded_left([prefix.ordinal for prefix in prefixes]),
            fed=torch.tensor([prefix.fed for prefix in prefixes], device=mask.device),
            sizes=_sizes(prefixes),
        )
        state.remember(cache)
        positions = next_position[..., None] + (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        real = torch.cat([held, mask], dim=1)
        output = self._model(
            input_ids=batch["input_ids"],
            attention_mask=real.long(),
            position_ids=positions if len(positions) > 1 else positions[0],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        stay = torch.cat([_padded_left([prefix.stay for prefix in prefixes]), mask], dim=1)
        new = mask.sum(dim=1)
        return Prefilled(
            _layers(cache), {}, real, stay, state.extended_index(real), state.fed + new, next_position + new,
            output.logits[:, -1], [prefix.visual for prefix in prefixes], sizes=state.extended_sizes(real),
        )  # fmt: skip

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }


def _in_front(stay: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Return the indices of True entries of (B, C), first to last, and their number in each row."""
    counts = stay.sum(dim=1)
    longest = int(counts.max())
    order = (~stay).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    valid = torch.arange(longest, device=order.device) < counts[:, None]
    return torch.where(valid, order, order[:, :1]), counts.tolist()


def _layers(cache: DynamicCache) -> Entries:
    found = {number: entries_of(layer) for number, layer in enumerate(cache.layers)}
    return {number: fields for number, fields in found.items() if fields}


def _sizes(prefixes: Sequence[Prefix]) -> torch.Tensor | None:
    """(B, C) sizes of the entries of several prefixes, padded on the left."""
    if all(prefix.sizes is None for prefix in prefixes):
        return None
    return _padded_left(
        [torch.ones_like(one.ordinal) if one.sizes is None else one.sizes for one in prefixes]
    )


def _padded_left(values: list[torch.Tensor]) -> torch.Tensor:
    """Stack (C, …) tensors of different lengths to (B, C, …), padded on the left with zeros."""
    return pad_sequence(values, batch_first=True, padding_side="left")
