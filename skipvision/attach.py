"""`attach`: the only file that touches a live model.

Hooks, and nothing else: no module is replaced, no class patched. One call passes them in this order:

    outer model   ``_arrive``            images encoded and found; or the call put in terms of a pruned cache
    decoder       ``_reduce``            plan, merge, summarise
      layer       `hook_layer`           skip-FFN by the plan that came with the call
    decoder       ``_restore``           hidden states back to the caller's length; cache compacted
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from skipvision.anatomy import masks, positions
from skipvision.anatomy.attention import check_readable
from skipvision.anatomy.families import (
    Anatomy,
    base_view,
    brings_images,
    check_patches,
    dissect,
    encode,
    skips_videos,
)
from skipvision.anatomy.images import Images
from skipvision.anatomy.probe import ffn_ratio, prompt_attention
from skipvision.anatomy.tower import hook_tower, received
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, InputError, UnsupportedModelError
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
from skipvision.skip_ffn import PLAN_KEYWORD, forget_plan, hook_layer, was_put_down
from skipvision.summaries import SUMMARY, place_summary, summary_in_use, take_summary
from skipvision.summary import SummaryLayer

_ARRIVAL = "skip_vision_arrival"
DECODED_KEYWORD = "skip_vision_decoded"
"""Keyword of a training call: (B, T) True from each row's first generated token on (see `attach`)."""
_ATTACHMENT = "_skip_vision"


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


class Attachment:
    """Skip-Vision on one model; made by `attach`, ended by `detach` or by leaving its ``with`` block.

    Attributes:
        model: the model it is attached to.
        config: what is applied.
        plan: `TokenPlan` of the last prefill that had images, else None.
        summary: the trainable summary layer, or None with summary_tokens=0; under PEFT that of the active
            adapter. While attached it is in a submodule of the decoder (``skip_summary``), so it moves,
            trains and shards with the model.
    """

    def __init__(self, model: nn.Module, config: SkipConfig) -> None:
        if not isinstance(config, SkipConfig):
            raise ConfigError(f"config is a {type(config).__name__}, {config!r}: pass a SkipConfig")
        anatomy = dissect(model)
        if hasattr(anatomy.decoder, _ATTACHMENT):
            raise ConfigError(
                "Skip-Vision is attached to this model already: detach() it first, or use that attachment"
            )
        _check(anatomy, config)
        _check_unsharded(model, config)
        self.model, self.config, self.plan = model, config, None
        self._anatomy = anatomy
        self._handles: list[RemovableHandle] = []
        self._detached_summary: nn.Module | None = None
        if config.summary_tokens:
            self._add_summary(config.summary_tokens)
        object.__setattr__(anatomy.decoder, _ATTACHMENT, self)
        self._hook()

    plan: TokenPlan | None

    @property
    def summary(self) -> SummaryLayer | None:
        """See the class."""
        attached = getattr(self._anatomy.decoder, _ATTACHMENT, None) is self
        module = getattr(self._anatomy.decoder, SUMMARY, None) if attached else self._detached_summary
        return None if module is None else summary_in_use(module)

    def detach(self) -> None:
        """Take everything off the model again; doing it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        decoder = self._anatomy.decoder
        if getattr(decoder, _ATTACHMENT, None) is self:
            object.__delattr__(decoder, _ATTACHMENT)
            if SUMMARY in decoder._modules:
                self._detached_summary = take_summary(decoder)

    @contextmanager
    def using(self, config: SkipConfig) -> Iterator[None]:
        """Apply another config to the calls in the ``with`` block; the summary layer stays as it is.

        Raises:
            ConfigError: the model cannot do it, or it asks for other summaries than there is a layer for.
        """
        self.check(config)
        own, self.config = self.config, config
        hooks = [] if own.select == "vision_attention" else self._tower_hooks()
        try:
            yield
        finally:
            self.config = own
            for hook in hooks:
                hook.remove()

    @contextmanager
    def growing(self, config: SkipConfig) -> Iterator[None]:
        """`using`; a summary layer that it needs where there is none stays, unless the block fails."""
        new = bool(config.summary_tokens) and self.summary is None
        if new:
            self._add_summary(config.summary_tokens)
        try:
            with self.using(config):
                yield
        except BaseException:
            if new:
                take_summary(self._anatomy.decoder)
            raise

    def check(self, config: SkipConfig) -> None:
        """Raise the `ConfigError` that `using` would."""
        _check(self._anatomy, config)
        there = 0 if self.summary is None else self.summary.score.out_features
        if config.summary_tokens not in (0, there):
            raise ConfigError(
                f"summary_tokens={config.summary_tokens}, but this model is attached with {there}: only that "
                "or 0 can be asked for call by call"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({type(self.model).__name__}, {self.config!r})"

    # ------------------------------------------------------------------------------------ set-up

    def _add_summary(self, summary_tokens: int) -> None:
        decoder = self._anatomy.decoder
        embedding = next(decoder.parameters())
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        summary = SummaryLayer(
            self._anatomy.hidden_size, summary_tokens, dtype=dtype, device=embedding.device
        )
        place_summary(self.model, decoder, summary.train(decoder.training))

    def _hook(self) -> None:
        anatomy, keep = self._anatomy, self._handles.append
        base = next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        self._advised = False
        keep(base.register_forward_pre_hook(self._advise, with_kwargs=True))
        keep(anatomy.outer.register_forward_pre_hook(self._arrive, with_kwargs=True))
        keep(anatomy.decoder.register_forward_pre_hook(self._reduce, with_kwargs=True))
        keep(anatomy.decoder.register_forward_hook(self._restore, with_kwargs=True))
        for layer in anatomy.layers:
            self._handles += hook_layer(*layer)
        self._handles += self._tower_hooks()

    def _tower_hooks(self) -> list[RemovableHandle]:
        """Only where they are asked for: they break the graph of a compiled tower."""
        if self.config.select != "vision_attention":
            return []
        return hook_tower(self._anatomy, lambda: self.config.select == "vision_attention")

    # ------------------------------------------------------------------------------------- hooks

    def _advise(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model that knows labels: say once what training without the mask comes to."""
        plain = kwargs.get("labels") is not None and kwargs.get(DECODED_KEYWORD) is None
        forgets = self.config.skip_kv and self.config.skipped
        if plain and forgets and not self._advised and torch.is_grad_enabled():
            self._advised = True
            _warn_of_plain_training()

    # Not what it calls: where the model is compiled, its image encoders are.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _arrive(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
                _check_mask(call.get("attention_mask"), visual.shape, call.get("past_key_values"))
            _refuse_packed(call)
            images = Images.locate(visual, sizes, self._anatomy.family.tiles)
            if self.config.select == "views":
                views = base_view(self._anatomy, images, sizes)
            if _needs_patches(self.config):
                check_patches(self._anatomy, sizes)
            if self.config.select == "vision_attention":
                tower = received(call, images)
        if state is not None:
            call = _on_pruned_cache(call, state, images is not None)
        return (), {**call, _ARRIVAL: _Arrival(call.get("attention_mask"), images, views, tower)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _reduce(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder pre-hook: the caller's sequence becomes the reduced one."""
        arrival: _Arrival | None = kwargs.pop(_ARRIVAL, None)
        decoded = _decoded_mask(kwargs.pop(DECODED_KEYWORD, None), kwargs.get("inputs_embeds"))
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
        _refuse_router_loss(kwargs, arrival.mask)
        return args, self._reduced(decoder, kwargs, fed, plan, decoded)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _restore(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
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

    # ------------------------------------------------------------------------------------- parts

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
        _check_probing([layer.whole for layer in probed], self.config.select)
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


def attach(model: nn.Module, config: SkipConfig) -> Attachment:
    """Apply Skip-Vision to a model by hooks on this one instance.

    Works in train and eval mode, under PEFT (attach after ``get_peft_model``, so that the summary
    layer stays trainable), with ``generate`` and with plain calls; hidden states and logits keep the
    caller's length, so labels line up. Positions that were dropped get zero hidden states; positions
    that were merged get their token's.

    With ``skip_kv`` an answer is generated from a cache that holds no skipped tokens, but a plain
    training call lets it see them. A training call ``model(…, skip_vision_decoded=mask)`` with a
    (B, T) mask, bool or 0 and 1, True from each row's first generated token on, hides them as decoding
    will: with labels of the answers alone, ``(labels != -100).cumsum(dim=1) > 0``. Training with
    ``labels`` and without the mask warns once.
    ``generate(use_cache=False)`` reads its whole text anew at each step, so that nothing is forgotten there.

    Attention weights (``output_attentions``) and router logits are those of the reduced sequence; the
    plan's ``source`` says which token each of its places is. The load-balancing loss of mixtures of experts
    is over the tokens that are routed, and refused where an ``attention_mask`` comes with it.

    Args:
        model: a supported Hugging Face vision-language model, bare or wrapped.
        config: what to apply.

    Returns:
        The attachment: a context manager that detaches on exit, or keep it and ``detach()``.

    Raises:
        UnsupportedModelError: the model does not have the parts that hooks need.
        ConfigError: attached already, or the config asks for what this model cannot do.
    """
    return Attachment(model, config)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment on a model, if there is one."""
    return getattr(dissect(model).decoder, _ATTACHMENT, None)


def _check(anatomy: Anatomy, config: SkipConfig) -> None:
    if config.probe_layer >= len(anatomy.layers):
        raise ConfigError(
            f"probe_layer={config.probe_layer}, but the decoder has layers 0 … {len(anatomy.layers) - 1}"
        )
    if config.select == "views" and anatomy.family.base_view is None:
        raise ConfigError(
            f"select='views' needs a multi-view family; {type(anatomy.outer).__name__} encodes one view per "
            "image"
        )

    if config.select == "attention":
        check_readable(anatomy.layers[config.probe_layer].attention)
    if _needs_patches(config) and not anatomy.family.patches:
        name = "merge='grid'" if config.merge == "grid" else "select='vision_attention'"
        raise ConfigError(
            f"{name} needs a family whose visual tokens are patches of one square picture; those of "
            f"{type(anatomy.outer).__name__} are not known to be (docs/families.md)"
        )


def _needs_patches(config: SkipConfig) -> bool:
    return config.merge == "grid" or config.select == "vision_attention"


def _check_unsharded(model: nn.Module, config: SkipConfig) -> None:
    """A summary layer that comes too late would train on each process by itself."""
    if not config.summary_tokens or not distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrappers = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    late = next((m for m in model.modules() if isinstance(m, wrappers)), None)
    if late is not None:
        raise ConfigError(
            f"{type(late).__name__} is around the model already and would not know the summary layer: attach "
            "before the model is wrapped or sharded, or set summary_tokens=0"
        )


def _check_probing(layers: list[nn.Module], select: str) -> None:
    """Processes that share the layers must run them equally often, whether they have an image or not."""
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for layer in layers for module in layer.modules()):
        raise ConfigError(
            f"select={select!r} runs the first layers once more where there are images, but layers sharded "
            "by FSDP must run in every process alike: use another select, or shard the model as a whole"
        )


def _decoded_mask(given: Any, embeds: torch.Tensor | None) -> torch.Tensor | None:
    """The caller's (B, T) mask of generated tokens, as bool; `InputError` if it cannot be one."""
    if given is None or embeds is None:
        return None
    needed = tuple(embeds.shape[:2])
    if not isinstance(given, torch.Tensor) or given.shape != needed:
        has = f"of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)[:80]
    elif given.is_floating_point() or given.is_complex() or bool(((given != 0) & (given != 1)).any()):
        has = f"of {given.dtype}" + ("" if given.is_floating_point() else " with values other than 0 and 1")
    else:
        return given.to(embeds.device, torch.bool)
    raise InputError(
        f"{DECODED_KEYWORD} is {has}: pass a bool tensor of shape {needed}, True from each row's first "
        "generated token on, such as (labels != -100).cumsum(dim=1) > 0"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_of_plain_training() -> None:
    warnings.warn(
        "answers are trained on skipped tokens, which will have left the KV cache when they are generated: "
        f"pass use_cache=False and {DECODED_KEYWORD}=(labels != -100).cumsum(dim=1) > 0, or attach with "
        "skip_kv=False",
        stacklevel=2,
    )


def _own_mask(
    mask: torch.Tensor | None, cache: Any, embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention mask of this call's own tokens (B, T), and of the cache before them (B, C); bool."""
    cached = _check_mask(mask, embeds.shape[:2], cache)
    if mask is None:
        mask = torch.ones(len(embeds), cached + embeds.shape[1], dtype=torch.bool, device=embeds.device)
    return mask[:, cached:].bool(), mask[:, :cached].bool()


def _check_mask(mask: Any, tokens: torch.Size, cache: Any) -> int:
    """Raise `InputError` unless a mask is over the C entries of the cache and (B, T) more; returns C."""
    rows, length = tokens
    cached: int = cache.get_seq_length() if cache is not None else 0
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (rows, cached + length)):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask {shape} cannot be reduced: a 2-D mask of shape {(rows, cached + length)} is "
            "expected (1 where there is a token), or none"
        )
    return cached


def _refuse_packed(call: dict[str, Any]) -> None:
    """Several documents in one row, told apart by positions that begin again, would see each other."""
    given, lengths = call.get("position_ids"), call.get("cu_seq_lens_q")
    how = None if lengths is None else f"cu_seq_lens_q={lengths.tolist()}"
    if given is not None and call.get("attention_mask") is None and _begins_again(given):
        how = "position_ids begin again within a row"
    if how is not None:
        raise InputError(
            f"packed documents ({how}) cannot be reduced together: give each document a row of its own, "
            "padded, with an attention_mask"
        )


def _begins_again(given: torch.Tensor) -> bool:
    """Positions (…, B, T) fall, on all axes at once where they have several; within an image not all do."""
    falls = given.diff(dim=-1) < 0
    return bool((falls.all(dim=0) if given.ndim == 3 else falls).any())


def _refuse_router_loss(kwargs: dict[str, Any], mask: torch.Tensor | None) -> None:
    """The families' load-balancing loss weighs the routed tokens by the caller's mask, which has others."""
    if kwargs.get("output_router_logits") and mask is not None:
        raise InputError(
            f"output_router_logits=True with an attention_mask of shape {tuple(mask.shape)}: only the tokens "
            "that take the FFN are routed, and the loss over them cannot take this mask. Leave out the mask "
            "(a batch without padding), or pass output_router_logits=False"
        )


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
