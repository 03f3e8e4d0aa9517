"""`attach`: the only file that touches a live model.

Hooks, and nothing else: no module is replaced, no class patched. One call passes them in this order:

    outer model   ``_find_images``       which positions are visual, from input_ids
    decoder       ``_reduce``            plan, merge, summarise; or continue on a pruned cache
      layer       `hook_layer`           skip-FFN by the plan that came with the call
    decoder       ``_restore``           hidden states back to the caller's length; cache compacted
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, InputError
from skipvision.families import Anatomy, dissect
from skipvision.images import Images
from skipvision.kv_cache import CacheState, compact, prunable_layers
from skipvision.merge import merge_tokens
from skipvision.plan import TokenPlan
from skipvision.planning import make_plan
from skipvision.probe import ffn_ratio
from skipvision.skip_ffn import PLAN_KEYWORD, forget_plan, hook_layer
from skipvision.summaries import SUMMARY, place_summary, summary_in_use, take_summary
from skipvision.summary import SummaryLayer

_IMAGES_KEYWORD = "skip_vision_images"
DECODED_KEYWORD = "skip_vision_decoded"
"""Keyword of a training call: (B, T) True from each row's first generated token on (see `attach`)."""
_ATTACHMENT = "_skip_vision"


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
            self._add_summary()
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
            if self.config.summary_tokens:
                self._detached_summary = take_summary(decoder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({type(self.model).__name__}, {self.config!r})"

    # ------------------------------------------------------------------------------------ set-up

    def _add_summary(self) -> None:
        decoder = self._anatomy.decoder
        embedding = next(decoder.parameters())
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        summary = SummaryLayer(
            self._anatomy.hidden_size, self.config.summary_tokens, dtype=dtype, device=embedding.device
        )
        place_summary(self.model, decoder, summary.train(decoder.training))

    def _hook(self) -> None:
        anatomy, keep = self._anatomy, self._handles.append
        keep(anatomy.outer.register_forward_pre_hook(self._find_images, with_kwargs=True))
        keep(anatomy.decoder.register_forward_pre_hook(self._reduce, with_kwargs=True))
        keep(anatomy.decoder.register_forward_hook(self._restore, with_kwargs=True))
        for layer in anatomy.layers:
            self._handles += hook_layer(layer)

    # ------------------------------------------------------------------------------------- hooks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _find_images(self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outer pre-hook: which positions hold which image, handed to the decoder as a keyword."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            embeds = kwargs.get("inputs_embeds")
            if (
                CacheState.of(kwargs.get("past_key_values")) is None
                and embeds is not None
                and embeds.shape[1] > 1
            ):
                raise InputError(
                    "inputs_embeds without input_ids: which positions are visual cannot be known. Pass "
                    "input_ids (and pixel_values), or detach() for this call"
                )
            return None
        visual = input_ids == self._anatomy.image_token_id
        placeholders = int(visual.sum())
        if placeholders == 0:
            return None
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and not _brings_images(kwargs):
            # Nothing but a sampled token that happens to be the placeholder's id.
            return None
        sizes = self._anatomy.family.image_sizes(kwargs, placeholders)
        return args, {**kwargs, _IMAGES_KEYWORD: Images.locate(visual, sizes)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _reduce(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decoder pre-hook: the caller's sequence becomes the reduced one."""
        images: Images | None = kwargs.pop(_IMAGES_KEYWORD, None)
        decoded: torch.Tensor | None = kwargs.pop(DECODED_KEYWORD, None)
        cache = kwargs.get("past_key_values")
        state = CacheState.of(cache)
        if images is None and state is None:
            return args, self._without_images(decoder, kwargs)
        if state is not None:
            kwargs = _continue_on_pruned(kwargs, state)
        if images is None:
            return args, kwargs
        embeds = kwargs["inputs_embeds"]
        mask, earlier = _own_mask(kwargs, embeds)
        # The probe sees this call's tokens alone, whatever the cache holds.
        scores = self._scores(decoder, {**kwargs, "attention_mask": mask}, images)
        plan = self.plan = make_plan(images.take(embeds), images, mask, self.config, scores)
        if plan.is_identity:
            return args, kwargs
        _ = plan.ffn_index  # its size depends on data: found here, it is an input of a compiled layer
        if cache is not None:
            prunable_layers(cache)  # refuse before the work, not after
        reduced = merge_tokens(embeds, plan)
        if self.config.summary_tokens:
            reduced = decoder.get_submodule(SUMMARY)(reduced, plan)
        attention_mask = torch.cat([earlier, plan.attention_mask], dim=1)
        if decoded is not None and self.config.skip_kv:
            if cache is not None:
                raise InputError(
                    f"{DECODED_KEYWORD} is for training calls: pass use_cache=False and no cache"
                )
            attention_mask = _forgetful_mask(plan, decoded, decoder, reduced.dtype)
        return args, {
            **kwargs,
            "inputs_embeds": reduced,
            "attention_mask": attention_mask,
            "position_ids": self._positions(kwargs.get("position_ids"), plan, mask, earlier.shape[1]),
            PLAN_KEYWORD: plan,
        }

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _restore(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Decoder post-hook: the caller's length for hidden states; the planned length for the cache."""
        plan: TokenPlan | None = kwargs.get(PLAN_KEYWORD)
        if plan is None:
            return None
        forget_plan()
        output.last_hidden_state = plan.to_caller(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(plan.to_caller(hidden) for hidden in output.hidden_states)
        cache = output.get("past_key_values")
        if cache is not None:
            self._prune(cache, plan, kwargs["attention_mask"])
        return output

    # ------------------------------------------------------------------------------------- parts

    def _without_images(self, decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call without images changes nothing; but in training the summary layer takes part in each."""
        embeds = kwargs.get("inputs_embeds")
        if not self.config.summary_tokens or embeds is None or not torch.is_grad_enabled():
            return kwargs
        return {**kwargs, "inputs_embeds": decoder.get_submodule(SUMMARY)(embeds, None)}

    def _scores(self, decoder: nn.Module, kwargs: dict[str, Any], images: Images) -> torch.Tensor | None:
        if self.config.select != "ffn_ratio":
            return None
        probed = self._anatomy.layers[: self.config.probe_layer + 1]
        _check_probing(probed)
        return images.take(ffn_ratio(decoder, probed[-1], kwargs))

    def _positions(
        self, position_ids: torch.Tensor | None, plan: TokenPlan, mask: torch.Tensor, offset: int
    ) -> torch.Tensor:
        """(…, B, L) position ids of the reduced sequence; arbitrary at padding."""
        rows, length = mask.shape
        if position_ids is None:
            position_ids = torch.arange(offset, offset + length, device=mask.device)[None]
        position_ids = position_ids.expand(*position_ids.shape[:-2], rows, length)
        if self.config.positions == "original":
            index = plan.position_source.clamp(min=0).expand(*position_ids.shape[:-2], -1, -1)
            return torch.take_along_dim(position_ids, index, dim=-1)
        first = torch.take_along_dim(position_ids, mask.to(torch.uint8).argmax(dim=1, keepdim=True), dim=-1)
        return (first + plan.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def _prune(self, cache: Any, plan: TokenPlan, mask: torch.Tensor) -> None:
        """Compact the cache after prefill and leave on it what later calls must know."""
        state = CacheState.of(cache)
        before = mask.shape[1] - plan.attention_mask.shape[1]
        keep = torch.cat([mask[:, :before].bool(), plan.cache_mask], dim=1)
        shift = plan.removed if self.config.positions == "contiguous" else torch.zeros_like(plan.removed)
        caller = before
        if state is not None:
            caller = state.caller_length + before - state.mask.shape[1]
            shift = shift + state.position_shift
        CacheState(compact(cache, keep), caller + plan.merged_into.shape[1], shift).remember(cache)


def attach(model: nn.Module, config: SkipConfig) -> Attachment:
    """Apply Skip-Vision to a model by hooks on this one instance.

    Works in train and eval mode, under PEFT (attach after ``get_peft_model``, so that the summary
    layer stays trainable), with ``generate`` and with plain calls; hidden states and logits keep the
    caller's length, so labels line up. Positions that were dropped get zero hidden states; positions
    that were merged get their token's.

    With ``skip_kv`` an answer is generated from a cache that holds no skipped tokens, but a plain
    training call lets it see them. A training call ``model(…, skip_vision_decoded=mask)`` with a
    (B, T) mask, True from each row's first generated token on, hides them as decoding will.

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
    if config.select == "views" and not anatomy.family.multi_view:
        raise ConfigError(
            f"select='views' needs a multi-view family; {type(anatomy.outer).__name__} encodes one view per "
            "image"
        )


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


def _check_probing(layers: nn.ModuleList) -> None:
    """Processes that share the layers must run them equally often, whether they have an image or not."""
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in layers.modules()):
        raise ConfigError(
            "select='ffn_ratio' runs the first layers once more where there are images, but layers sharded "
            "by FSDP must run in every process alike: use another select, or shard the model as a whole"
        )


def _brings_images(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("pixel_values") is not None or bool(
        (kwargs.get("mm_encoder_outputs") or {}).get("image")
    )


def _own_mask(kwargs: dict[str, Any], embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention mask of this call's own tokens (B, T), and of the cache before them (B, C); bool."""
    rows, length = embeds.shape[:2]
    cache = kwargs.get("past_key_values")
    cached = cache.get_seq_length() if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, cached + length, dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, torch.Tensor) or mask.shape != (rows, cached + length):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask {shape} cannot be reduced: a 2-D mask of shape {(rows, cached + length)} is "
            "expected (1 where there is a token), or none"
        )
    return mask[:, cached:].bool(), mask[:, :cached].bool()


def _forgetful_mask(
    plan: TokenPlan, decoded: torch.Tensor, decoder: nn.Module, dtype: torch.dtype
) -> torch.Tensor:
    """(B, 1, L, L) causal mask in which generated tokens do not see what will have left the cache."""
    implementation = getattr(decoder.config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        raise ConfigError(
            f"{DECODED_KEYWORD} needs attn_implementation 'sdpa' or 'eager', which take a mask per query; "
            f"this model has {implementation!r}"
        )
    length = plan.roles.shape[1]
    generated = plan.gather(decoded[..., None].long(), plan.source)[..., 0].bool()
    seen = plan.attention_mask[:, None, :] & ~(generated[:, :, None] & ~plan.cache_mask[:, None, :])
    square = torch.ones(length, length, dtype=torch.bool, device=decoded.device)
    # Padding sees itself: a row of a softmax must not be empty.
    mask = ((seen & square.tril()) | torch.eye(length, dtype=torch.bool, device=decoded.device))[:, None]
    if implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _continue_on_pruned(kwargs: dict[str, Any], state: CacheState) -> dict[str, Any]:
    """The call's mask and positions in terms of a pruned cache instead of the caller's sequence."""
    cached = kwargs["past_key_values"].get_seq_length()
    new = kwargs["inputs_embeds"].shape[1]
    mask = state.extended_mask(cached, new, kwargs.get("attention_mask"))
    positions = kwargs.get("position_ids")
    if positions is None:
        begin = state.caller_length + cached - state.mask.shape[1]
        positions = torch.arange(begin, begin + new, device=mask.device)[None]
    return {**kwargs, "attention_mask": mask, "position_ids": positions - state.position_shift[:, None]}
