"""Build a model without weights from its config, and run a short text through its decoder.

Run in a `DryRun`. `units` and `activations` count what such runs cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from skipvision.anatomy.families import Anatomy, dissect, takes_images, text_only
from skipvision.cost.dry_run import DryRun
from skipvision.cost.fitted import CHUNK
from skipvision.errors import UnsupportedModelError
from skipvision.loading import NO_IMAGE_MODEL, build_model


@dataclass(frozen=True)
class Design:
    """A model's config, as the key of cached measurements."""

    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        return cls(config.to_json_string(use_diff=False), config)


Numbers = tuple[int, ...] | None
"""Numbers of layers; None = of all."""


class Built(NamedTuple):
    """A model without weights, its parts, and the number of its parameters."""

    whole: PreTrainedModel
    anatomy: Anatomy
    weights: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, if a layer computes linear attention in chunks; else 0."""
        config = self.anatomy.text_config
        chunked = "linear_attention" in (getattr(config, "layer_types", None) or ())
        sizes = (getattr(config, name, None) for name in ("mamba_chunk_size", "chunk_size"))
        return next((size for size in sizes if size), CHUNK) if chunked else 0


class Stop(Exception):
    """Ends a run of the model once it has computed the part to be measured."""


@lru_cache(maxsize=4)
def built(design: Design) -> Built:
    """Build the model of a config. Raise `UnsupportedModelError` if Skip-Vision does not support it."""
    config = type(design.config).from_dict(design.config.to_dict())
    try:
        with DryRun(), torch.device("meta"):
            model = build_model(
                config, dtype=torch.float32, attn_implementation="eager", experts_implementation="batched_mm"
            )
    except ValueError as error:
        name = type(design.config).__name__
        if not takes_images(design.config):
            raise text_only(name) from None
        if NO_IMAGE_MODEL in str(error):
            raise UnsupportedModelError(
                f"{name} is not the config of an image-text-to-text model of transformers: pass the config "
                "of the whole model (model.config)"
            ) from None
        raise UnsupportedModelError(f"{name}: {error}") from error
    model.eval().requires_grad_(False)
    return Built(model, dissect(model), sum(parameter.numel() for parameter in model.parameters()))


def end_of(model: Built, last: int | None) -> nn.Module:
    """Return the module that a run ends with: the layer ``last``, or the decoder."""
    return model.anatomy.decoder if last is None else model.anatomy.layers[last].whole


def run(
    model: Built,
    end: nn.Module,
    tokens: int,
    ffn_tokens: int,
    skipping: Numbers = None,
    use_cache: bool = False,
) -> Any:
    """Run a text of ``tokens``; return the output of ``end``.

    Only ``ffn_tokens`` of the tokens enter the FFNs of the layers ``skipping``, None = of all.
    """
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise Stop

    with ExitStack() as stack:
        for number, layer in enumerate(model.anatomy.layers if ffn_tokens < tokens else ()):
            if layer.mlp is not None and (skipping is None or number in skipping):
                stack.enter_context(_shortened(layer.mlp, tokens, ffn_tokens))
        stack.callback(end.register_forward_hook(stop).remove)
        try:
            kept = {"past_key_values": DynamicCache(config=model.anatomy.text_config)} if use_cache else {}
            model.whole(**_text(model.whole, tokens), use_cache=use_cache, **kept)
        except Stop:
            return outputs[0] if outputs else None
    raise UnsupportedModelError(f"{type(model.whole).__name__} does not call its {type(end).__name__}")


def _text(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return a prompt without special tokens."""
    special = {value for value in vars(model.config).values() if isinstance(value, int)}
    word = next(number for number in count() if number not in special)
    ones = torch.ones(1, tokens, dtype=torch.long)
    accepted = inspect.signature(model.forward).parameters
    types = {name: 0 * ones for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
    return {"input_ids": word * ones, "attention_mask": ones, **types}


@contextmanager
def training_mode(model: Built, rank: int, below: bool) -> Iterator[None]:
    """Let parameters of the decoder train.

    Args:
        model: its decoder is frozen before and after.
        rank: rank of the LoRA on every linear layer of the decoder; 0 = the decoder itself trains.
        below: whether parameters below the first layer train too.
    """
    decoder = model.anatomy.decoder

    def from_below(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds.detach().requires_grad_() if below else embeds}

    handle = decoder.register_forward_pre_hook(from_below, with_kwargs=True)
    decoder.requires_grad_(not rank)
    try:
        with with_lora(model.anatomy, rank):
            yield
    finally:
        handle.remove()
        decoder.requires_grad_(False).zero_grad()


@contextmanager
def _shortened(mlp: nn.Module, tokens: int, ffn_tokens: int) -> Iterator[None]:
    """Make only the first ``ffn_tokens`` tokens enter a feed-forward network, and add zeros to the others."""

    def cut(mlp: nn.Module, args: Any) -> Any:
        return tuple(
            value[:, :ffn_tokens]
            if isinstance(value, torch.Tensor) and value.shape[:2] == (1, tokens)
            else value
            for value in args
        )

    def pad(mlp: nn.Module, args: Any, output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        padded = F.pad(update.reshape(1, ffn_tokens, -1), (0, 0, 0, tokens - ffn_tokens))
        return (padded, *output[1:]) if isinstance(output, tuple) else padded

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_lora(anatomy: Anatomy, rank: int) -> Iterator[None]:
    """Add LoRA to every linear layer of the decoder, as PEFT runs it; nothing with rank 0."""

    def add_lora(linear: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        dtype = output.dtype
        into = torch.empty(rank, args[0].shape[-1], dtype=dtype, device="meta", requires_grad=True)
        out = torch.empty(output.shape[-1], rank, dtype=dtype, device="meta", requires_grad=True)
        return output + F.linear(F.linear(args[0], into), out)

    layers: Any = anatomy.decoder.layers
    linears = [module for module in layers.modules() if type(module) is nn.Linear] if rank else []
    handles = [linear.register_forward_hook(add_lora) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
