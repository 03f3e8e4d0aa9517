"""The hooks that run a call on fewer tokens and return results of the caller's length.

One call passes them in this order::

    whole model   `Reduction.call`       warn of mistakes in training, count drafted tokens
    outer model   `Reduction.arrive`     encode and find images, or translate the call to a pruned cache
    decoder       `Reduction.reduce`     plan, merge, summarise
      layers      `hook_layer`           skip the FFN by the plan that comes with the call
    decoder       `Reduction.restore`    bring hidden states to the caller's length, compact the cache
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from skipvision._compat import hand_over_encoded
from skipvision.anatomy import masks, positions
from skipvision.anatomy.cache_layers import first_call_of
from skipvision.anatomy.checks import (
    DECODED_KEYWORD,
    check_mask,
    check_probing,
    decoded_mask,
    refuse_decoded_images,
    refuse_router_loss,
    warn_of_frozen_summary,
    warn_of_learnt_placeholders,
    warn_of_plain_training,
)
from skipvision.anatomy.deepstack import DeepStack, with_first_features
from skipvision.anatomy.encoding import encode
from skipvision.anatomy.families import Anatomy
from skipvision.anatomy.images import Images
from skipvision.anatomy.probe import EarlyRun
from skipvision.arrival import ARRIVAL, Arrival, announce, check_cache, find_placeholders
from skipvision.config import SkipConfig
from skipvision.drafts import DRAFTS, embed_drafts, note_drafts
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.kv_cache import CacheState, Entries, compact, keep_everything
from skipvision.merge import merge_tokens
from skipvision.plan import TokenPlan
from skipvision.planning import checked_reading, make_plan
from skipvision.skip_ffn import PLAN_KEYWORD, forget_plan, reached_layers
from skipvision.summaries import SUMMARY, summary_in_use
from skipvision.tokens import VisualTokens


class Reduction:
    """The hooks of one attached model.

    Attributes:
        config: applied to the calls from now on.
        plan: `TokenPlan` of the last prefill that had images, else None.
    """

    def __init__(self, anatomy: Anatomy, config: SkipConfig) -> None:
        self.config = config
        self.plan: TokenPlan | None = None
        self._anatomy = anatomy
        self._warned = False
        self._checked_summary = self._checked_labels = False

    def call(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the model that takes labels: warn of mistakes in training, and count drafts."""
        ids, labels = kwargs.get("input_ids", args[0] if args else None), kwargs.get("labels")
        if torch.is_grad_enabled() and (base.training or labels is not None):
            self._warn(base, ids, labels, decoded=kwargs.get(DECODED_KEYWORD) is not None)
        call = note_drafts(kwargs, self._anatomy.image_token_id)
        return call and (args, call)

    def _warn(self, base: nn.Module, ids: Any, labels: Any, *, decoded: bool) -> None:
        """Warn once of each: a frozen summary layer, labels at images, answers that see skipped tokens."""
        if self.config.summary_tokens and not self._checked_summary:
            self._checked_summary = True
            self._check_summary(base)
        if labels is None or not self.config.skipped:
            return
        if not self._checked_labels:
            self._checked_labels = warn_of_learnt_placeholders(labels, ids, self._anatomy.image_token_id)
        if self.config.skip_kv and not decoded and not self._warned:
            self._warned = True
            warn_of_plain_training()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _check_summary(self, base: nn.Module) -> None:
        layer = summary_in_use(self._anatomy.decoder.get_submodule(SUMMARY))
        frozen = not any(weight.requires_grad for weight in layer.parameters())
        if frozen and any(weight.requires_grad for weight in base.parameters()):
            warn_of_frozen_summary()

    # Not recursive: where the model is compiled, its image encoders stay compiled.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def arrive(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outer pre-hook: encode and find images; on a pruned cache, set mask and positions."""
        call = {**dict(zip(inspect.signature(outer.forward).parameters, args, strict=False)), **kwargs}
        visual = find_placeholders(call, self._anatomy.image_token_id)
        sizes: list[int] = []
        if visual is not None:
            check_cache(call, self.config)
            call, sizes = encode(outer, call, int(visual.sum()))
        announced = announce(call, visual, sizes, self._anatomy, self.config)
        return announced and ((), hand_over_encoded(outer, announced))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def reduce(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder pre-hook: replace the caller's sequence by the reduced one."""
        arrival: Arrival | None = kwargs.pop(ARRIVAL, None)
        decoded = decoded_mask(kwargs.pop(DECODED_KEYWORD, None), kwargs.get("inputs_embeds"))
        drafts = kwargs.pop(DRAFTS, None)
        if arrival is None:
            return args, self._without_images(decoder, kwargs)
        if "inputs_embeds" not in kwargs:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was not called with inputs_embeds: there is nothing to reduce"
            )
        fed = Fed.of(kwargs, arrival.mask)
        if drafts is not None:
            token, embeds = self._anatomy.image_token_id, kwargs["inputs_embeds"]
            kwargs = {**kwargs, "inputs_embeds": embed_drafts(self._anatomy.outer, embeds, drafts, token)}
            # Later drafts are checked on the pruned cache, so these must not see skipped tokens either.
            decoded = torch.zeros_like(fed.mask)
            decoded[:, -drafts.shape[1] :] = True
        call = _DecoderCall(
            decoder, with_first_features(decoder, kwargs), fed, decoded, drafting=drafts is not None
        )
        if arrival.images is None:
            return args, call.on_pruned_cache()
        refuse_decoded_images(decoded, arrival.images.everywhere(len(call.fed.mask)))
        plan = self.plan = self._plan(call, arrival.images, arrival.reading)
        # On a pruned cache, even an identity plan needs our mask: the caller's has another length.
        if plan.is_identity and CacheState.of(kwargs.get("past_key_values")) is None:
            return args, kwargs
        refuse_router_loss(kwargs, arrival.mask)
        return args, call.reduced(plan, self.config, self._prunable_cache(kwargs))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def restore(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Decoder post-hook: bring hidden states to the caller's length and the cache to the planned one."""
        if PLAN_KEYWORD not in kwargs:
            return None
        plan: TokenPlan = kwargs[PLAN_KEYWORD]
        if not reached_layers(plan):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} did not pass the plan on to its layers: Skip-Vision does not work "
                "with this model"
            )
        forget_plan()
        output.last_hidden_state = plan.to_caller(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            # Only some layers' may be requested.
            output.hidden_states = tuple(
                None if hidden is None else plan.to_caller(hidden) for hidden in output.hidden_states
            )
        cache = output.get("past_key_values")
        if cache is not None:
            _prune(cache, plan)
        return output

    def _without_images(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leave a call without images unchanged, but let the summary layer take part in training."""
        embeds = kwargs.get("inputs_embeds")
        if not self.config.summary_tokens or embeds is None or not torch.is_grad_enabled():
            return kwargs
        return {**kwargs, "inputs_embeds": decoder.get_submodule(SUMMARY)(embeds, None)}

    def _plan(self, call: _DecoderCall, images: Images, reading: torch.Tensor | None) -> TokenPlan:
        criterion = self.config.criterion
        if criterion.probe is not None:
            probed = self._anatomy.layers[: self.config.probe_layer + 1]
            check_probing([layer.whole for layer in probed], criterion.setting)
            run = EarlyRun(call.decoder, probed[-1], call.alone(), call.fed.mask, call.prompt)
            reading = images.take(checked_reading(criterion, criterion.probe.read(run), run.real))
        tokens = VisualTokens(images.take(call.kwargs["inputs_embeds"]), images.valid, reading)
        return make_plan(tokens, images, call.fed.mask, self.config)

    def _prunable_cache(self, kwargs: dict[str, Any]) -> Any:
        """Return a prunable cache for the call: new, converted or as given."""
        cache, config = kwargs.get("past_key_values"), self._anatomy.text_config
        use = kwargs.get("use_cache")
        if cache is None and (config.use_cache if use is None else use):
            cache = DynamicCache(config=config)
        if cache is not None:
            keep_everything(cache)
        return cache


@dataclass(frozen=True, eq=False)
class Fed:
    """The tokens that the rows of a decoder call have been fed: C cache entries, and T tokens of this call.

    Attributes:
        mask: (B, T) real tokens of this call.
        earlier: (B, C) real entries of the cache.
        token_index: (B, C + T) index of each among all tokens that its row was ever fed.
        first: (B,) tokens of the cache's first call; None if this call is the first.
    """

    mask: torch.Tensor
    earlier: torch.Tensor
    token_index: torch.Tensor
    first: torch.Tensor | None = None

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
            return cls(mask, earlier, state.extended_index(whole), state.first)
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
class _DecoderCall:
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

    def alone(self) -> dict[str, Any]:
        """Keyword arguments for this call's tokens alone, whatever the cache holds."""
        given = self.kwargs.get("attention_mask")
        own = given if masks.is_per_query(given) and not self.fed.cached else self.fed.mask
        return {**self.kwargs, "attention_mask": own}

    def on_pruned_cache(self) -> dict[str, Any]:
        """Keyword arguments of a call without images on a pruned cache: only the mask changes."""
        given, embeds = self.kwargs.get("attention_mask"), self.kwargs["inputs_embeds"]
        sight, fed = masks.Sight.of(self.decoder), self.fed
        mask = masks.decode_mask(
            sight, given, fed.whole, fed.token_index, embeds.shape[1], embeds.dtype, fed.first
        )
        return {**self.kwargs, "attention_mask": mask}

    def reduced(self, plan: TokenPlan, config: SkipConfig, cache: Any) -> dict[str, Any]:
        """Return keyword arguments for the reduced sequence.

        Also record on the cache the entries that the unreduced call would leave.
        """
        # Computed here as an input of compiled layers, because its size depends on the data.
        _ = plan.ffn_index
        if self.decoded is not None and not self.drafting and config.skip_kv and cache is not None:
            raise InputError(f"{DECODED_KEYWORD} is for training calls: pass use_cache=False and no cache")
        embeds = merge_tokens(self.kwargs["inputs_embeds"], plan)
        if config.summary_tokens:
            embeds = self.decoder.get_submodule(SUMMARY)(embeds, plan)
        return {
            **self._per_token(plan),
            "inputs_embeds": embeds,
            "attention_mask": self._mask(plan, embeds.dtype, config),
            "position_ids": self._positions(plan, config, cache),
            "past_key_values": cache,
            PLAN_KEYWORD: plan,
        }

    def _positions(self, plan: TokenPlan, config: SkipConfig, cache: Any) -> torch.Tensor:
        fed, original = self.fed, config.positions == "original"
        callers = positions.of_caller(self.kwargs.get("position_ids"), fed.mask, fed.cached)
        reduced = positions.of_reduced(callers, plan, fed.mask, original=original)
        if cache is not None:
            shift = positions.ends(callers, fed.mask) - positions.ends(reduced, plan.attention_mask)
            shift = torch.zeros_like(shift) if original else shift
            following = positions.ends(callers, torch.ones_like(fed.mask)) - shift
            Entries(fed.whole, fed.token_index, shift, following, fed.first).remember(cache)
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
            fed.first,
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


def _prune(cache: Any, plan: TokenPlan) -> None:
    """Compact the cache after prefill and leave a `CacheState` on it for later calls."""
    mask, token_index, shift, following, first = Entries.of(cache)
    state = CacheState.of(cache)
    length = plan.merged_into.shape[1]
    before = mask.shape[1] - length
    keep = torch.cat([mask[:, :before], plan.cache_mask], dim=1)
    reduced_index = torch.take_along_dim(token_index[:, before:], plan.position_source.clamp(min=0), dim=1)
    caller = before
    if state is not None:
        caller = state.caller_length + before - state.mask.shape[1]
        shift = shift + positions.of_axes(state.shift, len(shift))
    fed = token_index.masked_fill(~mask, -1).amax(dim=1) + 1
    kept, index = compact(cache, keep)
    entries = torch.cat([token_index[:, :before], reduced_index], dim=1)
    kept_index = torch.take_along_dim(entries, index, dim=1)
    first = fed if first is None else first
    CacheState(kept, caller + length, shift, following, kept_index, fed, first).remember(cache)
