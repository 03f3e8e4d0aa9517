"""`attach`: Skip-Vision on a live model.

Hooks, and nothing else: no module is replaced, no class patched. One call passes them in this order:

    outer model   `arrive`              images encoded and found; or the call put in terms of a pruned cache
    decoder       `reduce`              plan, merge, summarise
      layer       `hook_layer`           skip-FFN by the plan that came with the call
    decoder       `restore`             hidden states back to the caller's length; cache compacted
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from skipvision.anatomy.attention import check_readable
from skipvision.anatomy.checks import check_unsharded
from skipvision.anatomy.families import Anatomy, dissect
from skipvision.anatomy.tower import hook_tower
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError
from skipvision.plan import TokenPlan
from skipvision.reduction import Reduction, needs_patches
from skipvision.skip_ffn import hook_layer
from skipvision.summaries import SUMMARY, place_summary, summary_in_use, take_summary
from skipvision.summary import SummaryLayer

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
        if not isinstance(config, SkipConfig):
            raise ConfigError(f"config is a {type(config).__name__}, {config!r}: pass a SkipConfig")
        anatomy = dissect(model)
        if hasattr(anatomy.decoder, _ATTACHMENT):
            raise ConfigError(
                "Skip-Vision is attached to this model already: detach() it first, or use that attachment"
            )
        _check(anatomy, config)
        if config.summary_tokens:
            check_unsharded(model)
        self.model = model
        self._reduction = Reduction(anatomy, config)
        self._anatomy = anatomy
        self._handles: list[RemovableHandle] = []
        self._detached_summary: nn.Module | None = None
        if config.summary_tokens:
            self._add_summary(config.summary_tokens)
        object.__setattr__(anatomy.decoder, _ATTACHMENT, self)
        self._hook()

    @property
    def config(self) -> SkipConfig:
        """See the class."""
        return self._reduction.config

    @config.setter
    def config(self, config: SkipConfig) -> None:
        self._reduction.config = config

    @property
    def plan(self) -> TokenPlan | None:
        """See the class."""
        return self._reduction.plan

    @plan.setter
    def plan(self, plan: TokenPlan | None) -> None:
        self._reduction.plan = plan

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
        anatomy, reduction, keep = self._anatomy, self._reduction, self._handles.append
        base = next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        keep(base.register_forward_pre_hook(reduction.advise, with_kwargs=True))
        keep(anatomy.outer.register_forward_pre_hook(reduction.arrive, with_kwargs=True))
        keep(anatomy.decoder.register_forward_pre_hook(reduction.reduce, with_kwargs=True))
        keep(anatomy.decoder.register_forward_hook(reduction.restore, with_kwargs=True))
        for layer in anatomy.layers:
            self._handles += hook_layer(*layer)
        self._handles += self._tower_hooks()

    def _tower_hooks(self) -> list[RemovableHandle]:
        """Only where they are asked for: they break the graph of a compiled tower."""
        if self.config.select != "vision_attention":
            return []
        return hook_tower(self._anatomy, lambda: self.config.select == "vision_attention")


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
    if needs_patches(config) and not anatomy.family.patches:
        name = "merge='grid'" if config.merge == "grid" else "select='vision_attention'"
        raise ConfigError(
            f"{name} needs a family whose visual tokens are patches of one square picture; those of "
            f"{type(anatomy.outer).__name__} are not known to be (docs/families.md)"
        )
