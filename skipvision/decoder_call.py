"""A call of the decoder with the caller's sequence, and the calls that replace it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvision.anatomy import masks, positions
from skipvision.anatomy.cache_layers import first_call_of
from skipvision.anatomy.checks import DECODED_KEYWORD, check_mask
from skipvision.anatomy.deepstack import DeepStack
from skipvision.config import SkipConfig
from skipvision.drop import DROP_KEYWORD, DroppedCall
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.kv_cache import CacheState, Entries
from skipvision.merge import merge_tokens
from skipvision.plan import PLAN_KEYWORD, Drop, TokenPlan, joined_sizes
from skipvision.summaries import SUMMARY


@dataclass(frozen=True, eq=False)
class Fed:
    """The tokens that the rows of a decoder call have been fed: C cache entries, and T tokens of this call.

    Attributes:
        mask: (B, T) real tokens of this call.
        earlier: (B, C) real entries of the cache.
        token_index: (B, C + T) index of each among all tokens that its row was ever fed.
        first: (B,) tokens of the cache's first call; None if this call is the first.
        sizes: (B, C) tokens that attention counts each entry as; None = one each.
    """

    mask: torch.Tensor
    earlier: torch.Tensor
    token_index: torch.Tensor
    first: torch.Tensor | None = None
    sizes: torch.Tensor | None = None

    @classmethod
    def of(cls, kwargs: dict[str, Any], callers_mask: torch.Tensor | None) -> Fed:
        """Read them from a decoder's keyword arguments and the caller's (B, C + T) mask."""
        cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        cached = check_mask(callers_mask, embeds.shape[:2], cache)
        if callers_mask is None:
            shape = len(embeds), cached + embeds.shape[1]
            callers_mask = torch.ones(shape, dtype=torch.bool, device=embeds.device)
        mask, earlier = callers_mask[:, cached:].bool(), callers_mask[:, :cached].bool()
        state, whole = CacheState.of(cache), torch.cat([earlier, mask], dim=1)
        if state is not None:
            index = state.extended_index(whole)
            return cls(mask, earlier, index, state.first, state.extended_sizes(earlier))
        held = first_call_of(cache) if cached else None
        first = None if held is None else earlier[:, :held].sum(dim=1)
        return cls(mask, earlier, masks.token_indices(whole), first)

    @property
    def cached(self) -> int:
        """C, entries of the cache."""
        return self.earlier.shape[1]

    @property
    def whole(self) -> torch.Tensor:
        """(B, C + T) real entries and tokens."""
        return torch.cat([self.earlier, self.mask], dim=1)


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """A call of the decoder with the caller's sequence, and the calls that replace it.

    Attributes:
        decoder: text decoder.
        kwargs: its keyword arguments.
        fed: tokens of the cache and of this call.
        decoded: (B, T) generated tokens of a training call, or drafted ones; None otherwise.
        drafting: whether they are drafts of assisted decoding.
    """

    decoder: nn.Module
    kwargs: dict[str, Any]
    fed: Fed
    decoded: torch.Tensor | None
    drafting: bool = False

    @property
    def prompt(self) -> torch.Tensor:
        """(B, T) real tokens that are not generated."""
        return self.fed.mask if self.decoded is None else self.fed.mask & ~self.decoded

    @property
    def first(self) -> torch.Tensor | None:
        """(B,) tokens of the cache's first call, to which drafts that are checked in it do not belong."""
        if self.fed.first is not None or not self.drafting:
            return self.fed.first
        return self.fed.earlier.sum(dim=1) + self.prompt.sum(dim=1)

    def alone(self) -> dict[str, Any]:
        """Keyword arguments for this call's tokens alone, whatever the cache holds."""
        given = self.kwargs.get("attention_mask")
        own = given if masks.is_per_query(given) and not self.fed.cached else self.fed.mask
        return {**self.kwargs, "attention_mask": own}

    def on_pruned_cache(self) -> dict[str, Any]:
        """Keyword arguments of a call without images on a pruned cache: only the mask changes."""
        given, embeds = self.kwargs.get("attention_mask"), self.kwargs["inputs_embeds"]
        sight, fed = masks.Sight.of(self.decoder), self.fed
        sizes = joined_sizes((fed.sizes, fed.earlier), (None, fed.mask))
        mask = masks.decode_mask(
            sight, given, fed.whole, fed.token_index, embeds.shape[1], embeds.dtype, fed.first, sizes
        )
        call = {**self.kwargs, "attention_mask": mask}
        state = CacheState.of(self.kwargs.get("past_key_values"))
        if state is None or state.later is None:
            return call
        new, length = embeds.shape[:2], state.mask.shape[1]
        everything = torch.arange(new[1], device=embeds.device).expand(new)
        columns, real = state.later.extended(length, fed.whole)
        after = state.later.after
        later = masks.later_masks(self.decoder, after, mask, columns, real, everything, embeds.dtype)
        return {**call, DROP_KEYWORD: DroppedCall(after, later)}

    def reduced(self, plan: TokenPlan, config: SkipConfig, cache: Any) -> dict[str, Any]:
        """Return keyword arguments for the reduced sequence.

        Also record on the cache the entries that the unreduced call would leave.
        """
        # Computed here as an input of compiled layers, because its size depends on the data.
        _ = plan.ffn_index, plan.last.ffn_index
        if self.decoded is not None and not self.drafting and config.skip_kv and cache is not None:
            raise InputError(f"{DECODED_KEYWORD} is for training calls: pass use_cache=False and no cache")
        self._check_drop(None if plan.drop is None else plan.drop.after)
        embeds = merge_tokens(self.kwargs["inputs_embeds"], plan)
        if config.summary_tokens:
            embeds = self.decoder.get_submodule(SUMMARY)(embeds, plan)
        mask = self._mask(plan, embeds.dtype, config)
        return {
            **self._per_token(plan),
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": self._positions(plan, config, cache),
            "past_key_values": cache,
            PLAN_KEYWORD: plan,
            **({} if plan.drop is None else {DROP_KEYWORD: self._dropped(plan.drop, mask, embeds)}),
        }

    def _check_drop(self, after: int | None) -> None:
        """Raise an error if later layers cannot lack tokens of this call, or lack other ones already."""
        deep, added = DeepStack.of(self.kwargs), 0
        if deep is not None:
            added = len(deep.features) if deep.layers is None else max(deep.layers, default=0)
        if after is not None and added > after + 1:
            raise UnsupportedModelError(
                f"drop_after={after}, but this decoder adds features of images up to layer {added - 1}: drop "
                "after that",
                "features of images in later layers",
            )
        state = CacheState.of(self.kwargs.get("past_key_values"))
        held = None if state is None or state.later is None else state.later.after
        if held is not None and held != after:
            raise InputError(
                f"drop_after={after}, but this cache was filled with {held}: prefill it anew, or keep "
                "the value"
            )

    def _dropped(self, drop: Drop, mask: masks.Given, embeds: torch.Tensor) -> DroppedCall:
        fed, state = self.fed, CacheState.of(self.kwargs.get("past_key_values"))
        columns, real = earlier_of_later_layers(state, fed.earlier)
        later = masks.later_masks(
            self.decoder,
            drop.after,
            mask,
            torch.cat([columns, drop.index + fed.cached], dim=1),
            torch.cat([real, drop.plan.attention_mask], dim=1),
            drop.index,
            embeds.dtype,
        )
        return DroppedCall(drop.after, later, drop, embeds.shape[1])

    def _positions(self, plan: TokenPlan, config: SkipConfig, cache: Any) -> torch.Tensor:
        fed, original = self.fed, config.positions == "original"
        callers = positions.of_caller(self.kwargs.get("position_ids"), fed.mask, fed.cached)
        reduced = positions.of_reduced(callers, plan, fed.mask, original=original)
        if cache is not None:
            shift = positions.ends(callers, fed.mask) - positions.ends(reduced, plan.attention_mask)
            shift = torch.zeros_like(shift) if original else shift
            following = positions.ends(callers, torch.ones_like(fed.mask)) - shift
            Entries(fed.whole, fed.token_index, shift, following, self.first).remember(cache)
        return reduced

    def _mask(self, plan: TokenPlan, dtype: torch.dtype, config: SkipConfig) -> masks.Given:
        fed = self.fed
        return masks.prefill_mask(
            masks.Sight.of(self.decoder),
            plan,
            self.kwargs.get("attention_mask"),
            fed.token_index[:, fed.cached :],
            fed.earlier,
            fed.token_index[:, : fed.cached],
            dtype,
            self.decoded if config.skip_kv and config.skipped else None,
            self.first,
            joined_sizes((fed.sizes, fed.earlier), (plan.sizes, plan.attention_mask)),
        )

    def _per_token(self, plan: TokenPlan) -> dict[str, Any]:
        """Return the keyword arguments with every per-token tensor cut down to the reduced tokens."""
        rows, length = plan.merged_into.shape
        source = plan.position_source.clamp(min=0)
        taken = {
            name: value[torch.arange(rows, device=source.device)[:, None], source]
            for name, value in self.kwargs.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == (rows, length)
        }
        return {**self.kwargs, **taken, **_deep_features(self.kwargs, plan)}


def earlier_of_later_layers(
    state: CacheState | None, earlier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, M) index and mask of the cache's entries in later layers; without `LaterEntries`, all of them."""
    if state is not None and state.later is not None:
        return state.later.extended(state.mask.shape[1], earlier)
    return torch.arange(earlier.shape[1], device=earlier.device).expand(earlier.shape), earlier


def _deep_features(kwargs: dict[str, Any], plan: TokenPlan) -> dict[str, Any]:
    """DeepStack: merge the visual features that layers add, as the visual tokens were merged."""
    deep = DeepStack.of(kwargs)
    if deep is None:
        return {}
    stays = (plan.source >= 0) & torch.take_along_dim(deep.visual, plan.source.clamp(min=0), dim=1)
    merged = []
    for layer in deep.features:
        whole = layer.new_zeros(*deep.visual.shape, layer.shape[-1]).index_put((deep.visual,), layer)
        merged.append(merge_tokens(whole, plan)[stays])
    return DeepStack(stays, deep.layers, merged).arguments()
