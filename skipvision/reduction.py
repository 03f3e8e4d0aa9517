"""One call of an attached model: images found, the sequence reduced for the decoder and restored after it."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from skipvision.anatomy import masks, positions
from skipvision.anatomy.checks import (
    DECODED_KEYWORD,
    check_mask,
    check_probing,
    decoded_mask,
    refuse_packed,
    refuse_router_loss,
    warn_of_plain_training,
)
from skipvision.anatomy.encoding import brings_images, encode, skips_videos
from skipvision.anatomy.families import Anatomy, base_view, check_patches
from skipvision.anatomy.images import Images
from skipvision.anatomy.probe import ffn_ratio, prompt_attention
from skipvision.anatomy.tower import received
from skipvision.config import SkipConfig
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.kv_cache import (
    CacheState,
    Entries,
    SettledCache,
    compact,
    keep_everything,
    prunable_layers,
)
from skipvision.merge import merge_tokens
from skipvision.plan import TokenPlan
from skipvision.planning import make_plan
from skipvision.select import VisualTokens, by_view
from skipvision.skip_ffn import PLAN_KEYWORD, forget_plan, was_put_down
from skipvision.summaries import SUMMARY

_ARRIVAL = "skip_vision_arrival"


@dataclass(frozen=True, eq=False)
class _Arrival:
    """What the outer hook tells the decoder's: the caller's (B, …) mask over all it fed, and the images.

    Beside the images, (I, N) what only the outer call knows of their tokens: which are of the base view, or
    how much attention the vision tower pays them.
    """

    mask: torch.Tensor | None
    images: Images | None
    views: torch.Tensor | None = None
    received: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Fed:
    """What the rows of a decoder's call have been fed: C entries of the cache, and T tokens of this call.

    Attributes:
        mask: (B, T) real tokens of this call.
        earlier: (B, C) real entries of the cache.
        place: (B, C + T) place of each among all tokens that its row was ever fed.
    """

    mask: torch.Tensor
    earlier: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, kwargs: dict[str, Any], callers_mask: torch.Tensor | None) -> _Fed:
        """Of a decoder's keyword arguments and the caller's (B, C + T) mask."""
        cache = kwargs.get("past_key_values")
        mask, earlier = _own_mask(callers_mask, cache, kwargs["inputs_embeds"])
        state, whole = CacheState.of(cache), torch.cat([earlier, mask], dim=1)
        return cls(mask, earlier, masks.places(whole) if state is None else state.extended_place(whole))

    @property
    def cached(self) -> int:
        return self.earlier.shape[1]

    @property
    def whole(self) -> torch.Tensor:
        return torch.cat([self.earlier, self.mask], dim=1)


class Reduction:
    """The hooks that reduce the calls of one model.

    Attributes:
        config: what is applied.
        plan: `TokenPlan` of the last prefill that had images, else None.
    """

    def __init__(self, anatomy: Anatomy, config: SkipConfig) -> None:
        self.config = config
        self.plan: TokenPlan | None = None
        self._anatomy = anatomy
        self._advised = False

    def advise(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model that knows labels: say once what training without the mask comes to."""
        plain = kwargs.get("labels") is not None and kwargs.get(DECODED_KEYWORD) is None
        forgets = self.config.skip_kv and self.config.skipped
        if plain and forgets and not self._advised and torch.is_grad_enabled():
            self._advised = True
            warn_of_plain_training()

    # Not what it calls: where the model is compiled, its image encoders are.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def arrive(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outer pre-hook: images are encoded and found; a pruned cache gets its mask and positions."""
        call = {**dict(zip(inspect.signature(outer.forward).parameters, args, strict=False)), **kwargs}
        visual = self._placeholders(call)
        sizes: list[int] = []
        if visual is not None:
            call, sizes = encode(outer, call, int(visual.sum()))
        return self._announced(call, visual, sizes)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _placeholders(self, call: dict[str, Any]) -> torch.Tensor | None:
        """(B, T) where the images of an outer call stand; None if it has none."""
        input_ids, cache = call.get("input_ids"), call.get("past_key_values")
        if isinstance(cache, SettledCache):
            return None
        if skips_videos(call):
            warnings.warn("videos are not reduced: they pass Skip-Vision in full", stacklevel=2)
        if input_ids is None:
            embeds = call.get("inputs_embeds")
            if embeds is not None and embeds.shape[1] > 1:
                raise InputError(
                    f"inputs_embeds without input_ids, of shape {tuple(embeds.shape)}: which positions are "
                    "visual cannot be known. Pass input_ids (and pixel_values), or detach() for this call"
                )
            return None
        visual: torch.Tensor = input_ids == self._anatomy.image_token_id
        if not bool(visual.any()):
            if brings_images(call):
                raise InputError(
                    f"images came with input_ids of shape {tuple(input_ids.shape)} that hold no placeholder "
                    f"({self._anatomy.image_token_id}): build both with one processor call, or leave the "
                    "images out"
                )
            return None
        filled = cache is not None and cache.get_seq_length() > 0
        # Without images on a filled cache, a placeholder is a word that was sampled.
        return visual if brings_images(call) or not filled else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _announced(self, call: dict[str, Any], visual: torch.Tensor | None, sizes: list[int]) -> Any:
        """An outer call's arguments with what the decoder's hook must know; None to leave it as it is."""
        state = CacheState.of(call.get("past_key_values"))
        if visual is None and state is None:
            return None
        images = views = tower = None
        if visual is not None:
            if state is None:
                check_mask(call.get("attention_mask"), visual.shape, call.get("past_key_values"))
            refuse_packed(call)
            images = Images.locate(visual, sizes, self._anatomy.family.tiles)
            if self.config.select == "views":
                views = base_view(self._anatomy, images, sizes)
            if needs_patches(self.config):
                check_patches(self._anatomy, sizes)
            if self.config.select == "vision_attention":
                tower = received(call, images)
        if state is not None:
            call = _on_pruned_cache(call, state, images is not None)
        return (), {**call, _ARRIVAL: _Arrival(call.get("attention_mask"), images, views, tower)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def reduce(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder pre-hook: the caller's sequence becomes the reduced one."""
        arrival: _Arrival | None = kwargs.pop(_ARRIVAL, None)
        decoded = decoded_mask(kwargs.pop(DECODED_KEYWORD, None), kwargs.get("inputs_embeds"))
        if arrival is None:
            return args, self._without_images(decoder, kwargs)
        if "inputs_embeds" not in kwargs:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} was not called with inputs_embeds: there is nothing to reduce"
            )
        fed = _Fed.of(kwargs, arrival.mask)
        if arrival.images is None:
            return args, self._behind_pruned(decoder, kwargs, fed)
        plan = self.plan = self._planned(decoder, kwargs, fed, arrival, arrival.images, decoded)
        # Behind a pruned cache it takes a mask of ours to see as far as in the caller's sequence.
        if plan.is_identity and CacheState.of(kwargs.get("past_key_values")) is None:
            return args, kwargs
        refuse_router_loss(kwargs, arrival.mask)
        return args, self._reduced(decoder, kwargs, fed, plan, decoded)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def restore(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Decoder post-hook: the caller's length for hidden states; the planned length for the cache."""
        if PLAN_KEYWORD not in kwargs:
            return None
        plan: TokenPlan = kwargs[PLAN_KEYWORD]
        if not was_put_down(plan):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} did not pass the plan on to its layers: Skip-Vision does not work "
                "with this model"
            )
        forget_plan()
        output.last_hidden_state = plan.to_caller(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(plan.to_caller(hidden) for hidden in output.hidden_states)
        cache = output.get("past_key_values")
        if cache is not None:
            self._prune(cache, plan)
        return output

    def _without_images(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call without images changes nothing; but in training the summary layer takes part in each."""
        embeds = kwargs.get("inputs_embeds")
        if not self.config.summary_tokens or embeds is None or not torch.is_grad_enabled():
            return kwargs
        return {**kwargs, "inputs_embeds": decoder.get_submodule(SUMMARY)(embeds, None)}

    def _behind_pruned(self, decoder: nn.Module, kwargs: dict[str, Any], fed: _Fed) -> dict[str, Any]:
        """A call without images behind a pruned cache: only who sees whom is not as the caller thinks."""
        given, embeds = kwargs.get("attention_mask"), kwargs["inputs_embeds"]
        sight, new = masks.Sight.of(decoder), embeds.shape[1]
        return {
            **kwargs,
            "attention_mask": masks.decode_mask(sight, given, fed.whole, fed.place, new, embeds.dtype),
        }

    def _planned(
        self,
        decoder: nn.Module,
        kwargs: dict[str, Any],
        fed: _Fed,
        arrival: _Arrival,
        images: Images,
        decoded: torch.Tensor | None,
    ) -> TokenPlan:
        tokens = VisualTokens(images.take(kwargs["inputs_embeds"]), images.valid)
        scores = arrival.received
        if arrival.views is not None:
            scores = by_view(tokens, arrival.views)
        elif self.config.select in ("ffn_ratio", "attention"):
            given = kwargs.get("attention_mask")
            # The probe sees this call's tokens alone, whatever the cache holds.
            own = given if masks.is_per_query(given) and not fed.cached else fed.mask
            prompt = fed.mask if decoded is None else fed.mask & ~decoded
            scores = images.take(self._probed(decoder, {**kwargs, "attention_mask": own}, fed.mask, prompt))
        return make_plan(tokens, images, fed.mask, self.config, scores)

    def _reduced(
        self,
        decoder: nn.Module,
        kwargs: dict[str, Any],
        fed: _Fed,
        plan: TokenPlan,
        decoded: torch.Tensor | None,
    ) -> dict[str, Any]:
        """The decoder's keyword arguments for the reduced sequence; the cache is told what it would hold."""
        _ = plan.ffn_index  # its size depends on data: found here, it is an input of a compiled layer
        cache = self._prunable(kwargs)
        if decoded is not None and self.config.skip_kv and cache is not None:
            raise InputError(f"{DECODED_KEYWORD} is for training calls: pass use_cache=False and no cache")
        embeds = merge_tokens(kwargs["inputs_embeds"], plan)
        if self.config.summary_tokens:
            embeds = decoder.get_submodule(SUMMARY)(embeds, plan)
        original = self.config.positions == "original"
        callers = positions.of_caller(kwargs.get("position_ids"), fed.mask, fed.cached)
        reduced = positions.of_reduced(callers, plan, fed.mask, original=original)
        if cache is not None:
            shift = positions.ends(callers, fed.mask) - positions.ends(reduced, plan.attention_mask)
            shift = torch.zeros_like(shift) if original else shift
            following = positions.ends(callers, torch.ones_like(fed.mask)) - shift
            Entries(fed.whole, fed.place, shift, following).remember(cache)
        mask = masks.prefill_mask(
            masks.Sight.of(decoder),
            plan,
            kwargs.get("attention_mask"),
            fed.place[:, fed.cached :],
            fed.earlier,
            fed.place[:, : fed.cached],
            embeds.dtype,
            decoded if self.config.skip_kv else None,
        )
        return {
            **_per_token(kwargs, plan),
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": reduced,
            "past_key_values": cache,
            PLAN_KEYWORD: plan,
        }

    def _probed(
        self, decoder: nn.Module, call: dict[str, Any], real: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        """(B, T) of the caller's tokens, by the first layers."""
        probed = self._anatomy.layers[: self.config.probe_layer + 1]
        check_probing([layer.whole for layer in probed], self.config.select)
        whole, attention, mlp = probed[-1]
        if self.config.select == "attention":
            return prompt_attention(decoder, attention, call, real, prompt)
        return ffn_ratio(decoder, whole, mlp, call)

    def _prunable(self, kwargs: dict[str, Any]) -> Any:
        """The call's cache, made or remade so that it can be pruned; refused before the work, not after."""
        cache, config = kwargs.get("past_key_values"), self._anatomy.text_config
        use = kwargs.get("use_cache")
        if cache is None and (config.use_cache if use is None else use):
            cache = DynamicCache(config=config)
        if cache is not None:
            keep_everything(cache)
            prunable_layers(cache)
        return cache

    def _prune(self, cache: Any, plan: TokenPlan) -> None:
        """Compact the cache after prefill and leave on it what later calls must know."""
        mask, place, shift, following = Entries.of(cache)
        state = CacheState.of(cache)
        length = plan.merged_into.shape[1]
        before = mask.shape[1] - length
        keep = torch.cat([mask[:, :before], plan.cache_mask], dim=1)
        reduced_place = torch.take_along_dim(place[:, before:], plan.position_source.clamp(min=0), dim=1)
        caller = before
        if state is not None:
            caller = state.caller_length + before - state.mask.shape[1]
            shift = shift + positions.of_axes(state.shift, len(shift))
        fed = place.masked_fill(~mask, -1).amax(dim=1) + 1
        kept, index = compact(cache, keep)
        entries = torch.cat([place[:, :before], reduced_place], dim=1)
        places = torch.take_along_dim(entries, index, dim=1)
        CacheState(kept, caller + length, shift, following, places, fed).remember(cache)


def needs_patches(config: SkipConfig) -> bool:
    """Return whether a config needs to know which visual token is which patch."""
    return config.merge == "grid" or config.select == "vision_attention"


def _own_mask(
    mask: torch.Tensor | None, cache: Any, embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention mask of this call's own tokens (B, T), and of the cache before them (B, C); bool."""
    cached = check_mask(mask, embeds.shape[:2], cache)
    if mask is None:
        mask = torch.ones(len(embeds), cached + embeds.shape[1], dtype=torch.bool, device=embeds.device)
    return mask[:, cached:].bool(), mask[:, :cached].bool()


def _on_pruned_cache(call: dict[str, Any], state: CacheState, images: bool) -> dict[str, Any]:
    """The call's mask and positions in terms of a pruned cache instead of the caller's sequence."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    cached, new = call["past_key_values"].get_seq_length(), tokens.shape[1]
    mask = state.extended_mask(cached, new, call.get("attention_mask"))
    given = call.get("position_ids")
    if given is not None:
        shift = positions.of_axes(state.shift, len(given) if given.ndim == 3 else 1)
        own = given - (shift if given.ndim == 3 else shift[0])[..., None]
    elif images and len(state.next_position) > 1:
        raise InputError(
            "images behind a pruned cache need position_ids in this family: their positions have three axes "
            "and begin where the text before them ended"
        )
    else:
        later = torch.arange(new, device=mask.device) + cached - state.mask.shape[1]
        own = state.next_position[..., None] + later
        own = own if len(own) > 1 else own[0]
    return {**call, "attention_mask": mask, "position_ids": own}


def _per_token(kwargs: dict[str, Any], plan: TokenPlan) -> dict[str, Any]:
    """Other keywords that say something of every token, said of the reduced ones."""
    rows, length = plan.merged_into.shape
    source = plan.position_source.clamp(min=0)
    taken = {
        name: value[torch.arange(rows, device=source.device)[:, None], source]
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor) and value.shape[:2] == (rows, length)
    }
    return {**kwargs, **taken, **_deep_features(kwargs, plan)}


def _deep_features(kwargs: dict[str, Any], plan: TokenPlan) -> dict[str, Any]:
    """DeepStack: visual features that early layers add to the visual tokens, merged as these were."""
    visual, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if visual is None or features is None:
        return {}
    stays = (plan.source >= 0) & torch.take_along_dim(visual, plan.source.clamp(min=0), dim=1)
    merged = []
    for layer in features:
        whole = layer.new_zeros(*visual.shape, layer.shape[-1]).index_put((visual,), layer)
        merged.append(merge_tokens(whole, plan)[stays])
    return {"visual_pos_masks": stays, "deepstack_visual_embeds": merged}
