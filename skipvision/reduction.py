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
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from skipvision._compat import hand_over_encoded
from skipvision.anatomy import positions
from skipvision.anatomy.checks import (
    DECODED_KEYWORD,
    check_probing,
    decoded_mask,
    refuse_decoded_images,
    refuse_router_loss,
    warn_of_frozen_summary,
    warn_of_learnt_placeholders,
    warn_of_plain_training,
)
from skipvision.anatomy.deepstack import with_first_features
from skipvision.anatomy.encoding import encode
from skipvision.anatomy.families import Anatomy
from skipvision.anatomy.images import Images
from skipvision.anatomy.probe import EarlyRun
from skipvision.arrival import ARRIVAL, Arrival, announce, check_cache, find_placeholders
from skipvision.config import SkipConfig
from skipvision.decoder_call import DecoderCall, Fed, earlier_of_later_layers
from skipvision.determinantal import relevance
from skipvision.drafts import DRAFTS, embed_drafts, note_drafts
from skipvision.drop import DROP_KEYWORD
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.kv_cache import (
    CacheState,
    Entries,
    LaterEntries,
    SettledCache,
    compact,
    compact_later,
    keep_everything,
)
from skipvision.plan import PLAN_KEYWORD, Drop, TokenPlan, joined_sizes, sizes_above_one
from skipvision.planning import checked_reading, make_plan
from skipvision.skip_ffn import forget_plan, reached_layers
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
        # Decoding passes keywords only, and reading a signature takes as long as a layer's norms.
        names = inspect.signature(outer.forward).parameters if args else ()
        call = {**dict(zip(names, args, strict=False)), **kwargs}
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
            return args, _on_settled_cache(self._without_images(decoder, kwargs))
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
        call = DecoderCall(
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
        if not reached_layers(plan.last):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} did not pass the plan on to its layers: Skip-Vision does not work "
                "with this model"
            )
        forget_plan()
        output.last_hidden_state = plan.last.to_caller(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            # Only some layers' may be requested.
            output.hidden_states = tuple(
                None if hidden is None else _to_caller(plan, hidden) for hidden in output.hidden_states
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

    def _plan(self, call: DecoderCall, images: Images, reading: torch.Tensor | None) -> TokenPlan:
        criterion = self.config.criterion
        if criterion.probe is not None:
            probed = self._anatomy.layers[: self.config.probe_layer + 1]
            check_probing([layer.whole for layer in probed], criterion.setting)
            run = EarlyRun(call.decoder, probed[-1], call.alone(), call.fed.mask, call.prompt)
            reading = images.take(checked_reading(criterion, criterion.probe.read(run), run.real))
        elif criterion.reads == "prompt":
            reading = images.take(self._relevance(call, images, criterion.setting))
        tokens = VisualTokens(images.take(call.kwargs["inputs_embeds"]), images.valid, reading)
        return make_plan(tokens, images, call.fed.mask, self.config)

    @staticmethod
    def _relevance(call: DecoderCall, images: Images, setting: str) -> torch.Tensor:
        """(B, T) relevance of each token to the words of its row's prompt."""
        words = call.prompt & ~images.everywhere(len(call.prompt))
        if not bool(words.any(dim=1)[images.row].all()):
            raise InputError(
                f"{setting} compares images with the text of their prompt, and a row of this call has none: "
                "add text to the prompt, or choose another select"
            )
        return relevance(call.kwargs["inputs_embeds"], words)

    def _prunable_cache(self, kwargs: dict[str, Any]) -> Any:
        """Return a prunable cache for the call: new, converted or as given."""
        cache, config = kwargs.get("past_key_values"), self._anatomy.text_config
        use = kwargs.get("use_cache")
        if cache is None and (config.use_cache if use is None else use):
            cache = DynamicCache(config=config)
        if cache is not None:
            keep_everything(cache)
        return cache


def _on_settled_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let later layers run as the owner of the cache says."""
    cache = kwargs.get("past_key_values")
    call = cache.dropped_call() if isinstance(cache, SettledCache) else None
    return kwargs if call is None else {**kwargs, DROP_KEYWORD: call}


def _to_caller(plan: TokenPlan, hidden: torch.Tensor) -> torch.Tensor:
    """(B, L or M, H) → (B, T, H) of any layer."""
    return (plan if hidden.shape[1] == plan.roles.shape[1] else plan.last).to_caller(hidden)


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
    later = None
    if plan.drop is None:
        kept, index = compact(cache, keep)
    else:
        kept, index, later = _prune_both(cache, keep, plan.drop, state, mask[:, :before])
    entries = torch.cat([token_index[:, :before], reduced_index], dim=1)
    kept_index = torch.take_along_dim(entries, index, dim=1)
    first = fed if first is None else first
    sizes = _sizes_left(plan, state, mask[:, :before], kept, index)
    CacheState(kept, caller + length, shift, following, kept_index, fed, first, later, sizes).remember(cache)


def _sizes_left(
    plan: TokenPlan,
    state: CacheState | None,
    earlier: torch.Tensor,
    kept: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor | None:
    """(B, K) sizes of the entries that stay; None if each is one, as when all merged tokens have left."""
    before = None if state is None else state.extended_sizes(earlier)
    sizes = joined_sizes((before, earlier), (plan.sizes, plan.cache_mask))
    if sizes is None:
        return None
    return sizes_above_one(torch.take_along_dim(sizes, index, dim=1).masked_fill(~kept, 1))


def _prune_both(
    cache: Any, keep: torch.Tensor, drop: Drop, state: CacheState | None, earlier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LaterEntries]:
    """Compact the layers that lack no tokens, and those that do."""
    kept, index = compact(cache, keep, slice(drop.after + 1))
    columns, real = earlier_of_later_layers(state, earlier)
    entries = torch.cat([columns, drop.index + earlier.shape[1]], dim=1)
    real = torch.cat([real, drop.plan.cache_mask], dim=1)
    later = LaterEntries(drop.after, entries, real)
    return kept, index, compact_later(cache, later, real, kept, index)
