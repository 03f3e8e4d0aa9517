"""`attach`: Skip-Vision on a live model, by hooks. No module is replaced and no class patched.

Only the method `generate` of this one model is replaced, by one that first checks its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from skipvision._compat import (
    EncoderOverride,
    decoder_cache_layers,
    forget_encoded,
    override_encoders,
    takes_encoded,
)
from skipvision._compat_generation import GenerateOverride
from skipvision.anatomy.checks import check_adapters, check_in_memory, check_unsharded
from skipvision.anatomy.families import Anatomy, Layer, dissect
from skipvision.anatomy.masks import Sight
from skipvision.anatomy.probe import Probe
from skipvision.anatomy.tower import hook_tower
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, UnsupportedModelError
from skipvision.generating import check_generate
from skipvision.kv_cache import hook_block_indexer
from skipvision.plan import TokenPlan
from skipvision.reduction import Reduction
from skipvision.skip_ffn import hook_layer
from skipvision.summaries import SUMMARY, place_summary, summary_in_use, take_summary
from skipvision.summary import SummaryLayer

_ATTACHMENT = "_skip_vision"


class Attachment:
    """Skip-Vision on one model. `attach` creates it; `detach`, or leaving its ``with`` block, removes it.

    Attributes:
        model: the model it is attached to.
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
        check_in_memory(model)
        check_adapters(model)
        if config.summary_tokens:
            check_unsharded(model)
        self.model = model
        self._anatomy = anatomy
        self._reduction = Reduction(anatomy, config)
        self._handles: list[RemovableHandle | EncoderOverride | GenerateOverride] = []
        self._detached_summary: nn.Module | None = None
        if config.summary_tokens:
            self._add_summary(config.summary_tokens)
        object.__setattr__(anatomy.decoder, _ATTACHMENT, self)
        self._hook()

    @property
    def config(self) -> SkipConfig:
        """The config applied to calls."""
        return self._reduction.config

    @config.setter
    def config(self, config: SkipConfig) -> None:
        self._reduction.config = config

    @property
    def plan(self) -> TokenPlan | None:
        """`TokenPlan` of the last prefill that had images, else None."""
        return self._reduction.plan

    @plan.setter
    def plan(self, plan: TokenPlan | None) -> None:
        self._reduction.plan = plan

    @property
    def summary(self) -> SummaryLayer | None:
        """The trainable summary layer, under PEFT the active adapter's; None with summary_tokens=0.

        While attached it is a submodule of the decoder (``skip_summary``), so it moves, trains and shards
        with the model.
        """
        attached = getattr(self._anatomy.decoder, _ATTACHMENT, None) is self
        module = getattr(self._anatomy.decoder, SUMMARY, None) if attached else self._detached_summary
        return None if module is None else summary_in_use(module)

    def detach(self) -> None:
        """Remove everything from the model. Calling it twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        decoder = self._anatomy.decoder
        if getattr(decoder, _ATTACHMENT, None) is self:
            object.__delattr__(decoder, _ATTACHMENT)
            if hasattr(decoder, SUMMARY):
                self._detached_summary = take_summary(decoder)

    @contextmanager
    def using(self, config: SkipConfig) -> Iterator[None]:
        """Apply another config to the calls in the ``with`` block; the summary layer does not change.

        Raises:
            ConfigError: the model cannot run under it, or it needs another number of summary tokens.
        """
        self.check(config)
        own, self.config = self.config, config
        hooks = [] if own.criterion.reads == "tower" else self._tower_hooks()
        try:
            yield
        finally:
            self.config = own
            for hook in hooks:
                hook.remove()

    @contextmanager
    def growing(self, config: SkipConfig) -> Iterator[None]:
        """`using` that adds a missing summary layer, which stays unless the block fails."""
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
        """Raise the `ConfigError` that `using` would raise."""
        _check(self._anatomy, config)
        attached = 0 if self.summary is None else self.summary.score.out_features
        if config.summary_tokens not in (0, attached):
            raise ConfigError(
                f"summary_tokens={config.summary_tokens}, but this model is attached with {attached}: use "
                "that number or 0"
            )

    def check_training(self) -> None:
        """Raise the `ConfigError` that a call with ``skip_vision_decoded`` would raise for this model."""
        if self.config.skip_kv and self.config.skipped:
            Sight.of(self._anatomy.decoder).check_masks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({type(self.model).__name__}, {self.config!r})"

    def _add_summary(self, summary_tokens: int) -> None:
        decoder = self._anatomy.decoder
        embedding = next(decoder.parameters())
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        summary = SummaryLayer(
            self._anatomy.hidden_size, summary_tokens, dtype=dtype, device=embedding.device
        )
        place_summary(self.model, decoder, summary.train(decoder.training))

    def _hook(self) -> None:
        anatomy, reduction, keep = self._anatomy, self._reduction, self._handles.append
        base = self._base()
        if base.can_generate():
            keep(GenerateOverride(base, self._check_generate))
        keep(base.register_forward_pre_hook(reduction.call, with_kwargs=True))
        keep(anatomy.outer.register_forward_pre_hook(reduction.arrive, with_kwargs=True))
        if not takes_encoded(anatomy.outer):
            self._handles += override_encoders(anatomy.outer)
            keep(anatomy.outer.register_forward_hook(forget_encoded, always_call=True))
        keep(anatomy.decoder.register_forward_pre_hook(reduction.reduce, with_kwargs=True))
        keep(anatomy.decoder.register_forward_hook(reduction.restore, with_kwargs=True))
        for number, layer in enumerate(anatomy.layers):
            self._handles += hook_layer(number, layer)
            self._handles += hook_block_indexer(layer.attention)
        self._handles += self._tower_hooks()

    def _base(self) -> PreTrainedModel:
        """Return the Hugging Face model, without wrappers."""
        return next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))

    def _check_generate(self, given: dict[str, Any]) -> None:
        check_generate(self._base(), given, self._anatomy.image_token_id, self.config)

    def _tower_hooks(self) -> list[RemovableHandle]:
        """Hook the vision tower only if the criterion reads it: the hooks break a compiled tower's graph."""
        if self.config.criterion.reads != "tower":
            return []
        return hook_tower(self._anatomy, lambda: self.config.criterion.reads == "tower")


def attach(model: nn.Module, config: SkipConfig) -> Attachment:
    """Apply Skip-Vision to a model by hooks on this one instance.

    Works in train and eval mode, under PEFT (attach after ``get_peft_model``, so that the summary layer stays
    trainable), with ``generate`` and with plain calls. Hidden states and logits keep the caller's length, so
    labels line up. Dropped positions get zero hidden states; merged positions get those of the token they
    were merged into.

    With ``skip_kv`` an answer is generated from a cache without skipped tokens, but a plain training call
    lets the answer see them. Pass ``model(…, skip_vision_decoded=mask)`` in training to hide them as decoding
    will: ``mask`` is (B, T), bool or 0 and 1, and True from each row's first generated token on. With labels
    on the answers alone that is ``(labels != -100).cumsum(dim=1) > 0``. Training with ``labels`` and without
    the mask warns once. ``generate(use_cache=False)`` reads its whole text anew at each step, so nothing is
    forgotten.

    Attention weights (``output_attentions``) and router logits are those of the reduced sequence; the plan's
    ``source`` gives the token of each index. The load-balancing loss of mixtures of experts covers the routed
    tokens, and raises if an ``attention_mask`` comes with it.

    Args:
        model: a supported Hugging Face vision-language model, bare or wrapped.
        config: what to apply.

    Returns:
        The attachment: use it as a context manager, which detaches on exit, or keep it and ``detach()``.

    Raises:
        UnsupportedModelError: the model lacks a part that the hooks need.
        ConfigError: Skip-Vision is attached already, or this model cannot run under the config.
    """
    return Attachment(model, config)


def attachment_of(model: nn.Module) -> Attachment | None:
    """Return the attachment on a model, or None."""
    return getattr(dissect(model).decoder, _ATTACHMENT, None)


def _check(anatomy: Anatomy, config: SkipConfig) -> None:
    """Raise an error if a model cannot run under a config."""
    if config.probe_layer >= len(anatomy.layers):
        raise ConfigError(
            f"probe_layer={config.probe_layer}, but the decoder has layers 0 … {len(anatomy.layers) - 1}"
        )
    last = len(anatomy.layers) - 1
    if config.skip_layers != "all" and config.skip_layers[-1] > last:
        raise ConfigError(f"skip_layers={[*config.skip_layers]}, but the decoder has layers 0 … {last}")
    if config.drop_after is not None:
        _check_drop(anatomy, config.drop_after)
    if config.size_bias:
        _check_masks(anatomy, "size_bias=True", "take no bias", "set size_bias to false")
    criterion, outer = config.criterion, type(anatomy.outer).__name__
    if criterion.reads == "views" and anatomy.family.base_view is None:
        raise ConfigError(
            f"{criterion.setting} needs a multi-view family; {outer} encodes one view per image"
        )
    if criterion.probe is not None:
        _check_probe(criterion.probe, anatomy, config.probe_layer)
    for method in (config.merging, criterion):
        if method.needs_patches and not anatomy.family.patches:
            raise ConfigError(
                f"{method.setting} needs a family whose visual tokens are patches of one square image; "
                f"those of {outer} are not known to be (docs/families.md)"
            )


def _check_drop(anatomy: Anatomy, after: int) -> None:
    """Raise an error unless the layers after one layer can lack tokens."""
    last = len(anatomy.layers) - 1
    if after >= last:
        raise ConfigError(
            f"drop_after={after}, but the decoder has layers 0 … {last}: name one that has a layer after it"
        )
    _check_masks(anatomy, f"drop_after={after}", "cannot leave tokens out", "set drop_after to null")


def _check_masks(anatomy: Anatomy, setting: str, reason: str, remedy: str) -> None:
    """Raise an error unless every layer has keys and values of its own, and takes a mask per query.

    Args:
        anatomy: of the model.
        setting: that needs it.
        reason: what other layers cannot do.
        remedy: what to do.
    """
    kinds = [type(layer) for layer in decoder_cache_layers(anatomy.text_config)]
    others = sorted({kind.__name__ for kind in kinds} - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    if others or not all(layer.attends for layer in anatomy.layers):
        raise UnsupportedModelError(
            f"{setting}: {type(anatomy.decoder).__name__} has layers that keep something else than keys and "
            f"values of their own ({', '.join(others) or 'no attention'}) and {reason}: {remedy}",
            "layers without keys and values of their own",
        )
    sight = Sight.of(anatomy.decoder)
    if not sight.takes_masks:
        raise ConfigError(
            f"{setting} needs attention that takes a mask per query, not {sight.implementation!r}: "
            f"load the model with attn_implementation='sdpa' or 'eager', or {remedy}"
        )


def _check_probe(probe: Probe, anatomy: Anatomy, number: int) -> None:
    """Raise an error if a layer cannot be read; if it lacks what is read, name the layers that have it."""
    layer = anatomy.layers[number]
    try:
        probe.check(layer)
    except UnsupportedModelError as error:
        others = [str(each) for each, one in enumerate(anatomy.layers) if _can_be_read(probe, one)]
        if not others or (layer.attends and layer.mlp is not None):
            raise
        name = type(layer.attention or layer.mlp).__name__
        raise ConfigError(
            f"probe_layer={number} is a {name}, which cannot be read: set "
            f"probe_layer to one of the decoder's layers {', '.join(others)}"
        ) from error


def _can_be_read(probe: Probe, layer: Layer) -> bool:
    try:
        probe.check(layer)
    except UnsupportedModelError:
        return False
    return True
