"""Run a prompt twice: with every token on the full path, and with Skip-FFN alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from skipvision.analysis.ratios import full_tokens
from skipvision.anatomy.families import Anatomy, dissect
from skipvision.anatomy.probe import hidden_of
from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.plan import TokenRole

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True, eq=False)
class Run:
    """Hidden states of one run.

    Attributes:
        hidden: (1, T, H) before the first layer, and after each layer.
        output: (1, T, H) after the decoder's last norm.
        seen: (1, T or fewer, …) outputs of the watched modules.
    """

    hidden: list[torch.Tensor]
    output: torch.Tensor
    seen: dict[nn.Module, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """Both runs of one prompt of T tokens.

    Attributes:
        anatomy: parts of the model.
        final_norm: the decoder's last norm.
        full: every token on the full path.
        bypass: the same tokens; those of ``skipped`` bypass the FFN.
        skipped: (T,) True for tokens that bypass the FFN.
        layers: each layer as a function of hidden states (1, T, H), with the second run's other arguments.
    """

    anatomy: Anatomy
    final_norm: nn.Module
    full: Run
    bypass: Run
    skipped: torch.Tensor
    layers: list[Callable[[torch.Tensor], torch.Tensor]]


def bypass_only(config: SkipConfig) -> SkipConfig:
    """Return a config that retains the same tokens, skips all others, and changes nothing but the FFN."""
    return config.model_copy(
        update={
            "skipped": 1.0,
            "summary_tokens": 0,
            "skip_ffn": True,
            "skip_layers": "all",
            "drop_after": None,
            "skip_kv": False,
            "layout": "raster",
            "positions": "original",
        }
    )


@contextmanager
def run_twice(
    model: nn.Module, inputs: Mapping[str, Any], config: SkipConfig, watched: list[nn.Module]
) -> Iterator[Pair]:
    """Run a prompt with full tokens and with Skip-FFN alone. `Pair.layers` work inside the ``with`` block.

    Args:
        model: in eval mode; Skip-Vision may be attached.
        inputs: one row.
        config: decides which tokens are retained.
        watched: other modules whose outputs to keep.

    Raises:
        UnsupportedModelError: the decoder changes hidden states between its layers, or has no final norm.
        InputError: the inputs have several rows, padding, or no image.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if len(ids) != 1 or (mask is not None and not bool(mask.all())):
        raise InputError(f"input_ids of shape {tuple(ids.shape)}: pass one row, without padding")
    anatomy = dissect(model)
    norm = next((getattr(anatomy.decoder, n) for n in _FINAL_NORMS if hasattr(anatomy.decoder, n)), None)
    if norm is None:
        raise UnsupportedModelError(
            f"{type(anatomy.decoder).__name__} has none of {', '.join(_FINAL_NORMS)}: its final norm is not "
            "known",
            "no final norm",
        )
    with full_tokens(model):
        full, _ = _run(model, inputs, anatomy, norm, watched)
    with _bypassing(model, bypass_only(config)) as attachment:
        bypass, calls = _run(model, inputs, anatomy, norm, watched)
        if attachment.plan is None:
            raise InputError(
                "the prompt has no image, so no token can bypass the FFN: pass a prompt with an image"
            )
        functions = [
            _as_function(layer.whole, args, kwargs)
            for layer, (args, kwargs) in zip(anatomy.layers, calls, strict=True)
        ]
        skipped = attachment.plan.roles[0] == TokenRole.SKIPPED
        yield Pair(anatomy, norm, full, bypass, skipped, functions)


@contextmanager
def _bypassing(model: nn.Module, config: SkipConfig) -> Iterator[Attachment]:
    attachment = attachment_of(model)
    if attachment is None:
        with attach(model, config) as own:
            yield own
    else:
        attachment.plan = None
        with attachment.using(config):
            yield attachment


def _run(
    model: nn.Module, inputs: Mapping[str, Any], anatomy: Anatomy, norm: nn.Module, watched: list[nn.Module]
) -> tuple[Run, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((args[1:], given))
        before.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = hidden_of(output)

    handles = [layer.whole.register_forward_pre_hook(keep_call, with_kwargs=True) for layer in anatomy.layers]
    handles += [
        layer.whole.register_forward_hook(lambda layer, args, output: after.append(hidden_of(output)))
        for layer in anatomy.layers
    ]
    handles += [module.register_forward_hook(keep_output) for module in {*watched, norm}]
    try:
        with torch.no_grad():
            model(**{**inputs, "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    for number, (one, next_one) in enumerate(zip(after[:-1], before[1:], strict=True)):
        if one.shape != next_one.shape or not torch.equal(one, next_one):
            raise UnsupportedModelError(
                f"{type(anatomy.decoder).__name__} changes hidden states between layers {number} and "
                f"{number + 1}: no error bound is known for that",
                "hidden states are changed between layers",
            )
    return Run([before[0], *after], seen[norm], seen), calls


def _as_function(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(hidden: torch.Tensor) -> torch.Tensor:
        # Only this attention kernel can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return hidden_of(layer(hidden, *args, **kwargs))

    return call
