"""FFN magnitude ratio: how much the FFN changes each token, read from one early run (METHOD piece 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


class _Enough(Exception):
    """Ends the probing run: the layers behind the probed one need not be computed."""


@torch.no_grad()
def ffn_ratio(decoder: nn.Module, layer: nn.Module, mlp: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """(B, T) ‖h′ − h‖ / ‖h‖ at one decoder layer, over the unreduced input.

    h′ is the layer's output, h the same without its FFN's: so in every family, whatever it does to an
    FFN's output before it adds it. The decoder runs as it is up to the layer and no further.

    Args:
        decoder: text decoder.
        layer: the layer to read.
        mlp: its feed-forward network.
        call: keyword arguments of the decoder's call; its cache is left alone.
    """
    seen: list[torch.Tensor] = []

    # A compiled layer does not see hooks that are put on for one call: this one layer runs as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _random_numbers_kept(module):
            seen.append(hidden_of(module.forward(*args, **kwargs)))
        with silenced(mlp):
            seen.append(hidden_of(module.forward(*args, **kwargs)))
        raise _Enough

    alone = {"past_key_values": None, "use_cache": False, "output_hidden_states": False}
    handle = layer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        decoder.forward(**{**call, **alone})
    except _Enough:
        pass
    finally:
        handle.remove()
    changed, unchanged = (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) for hidden in seen)
    length = unchanged.norm(dim=-1).clamp(min=torch.finfo(unchanged.dtype).tiny)
    return (changed - unchanged).norm(dim=-1) / length


def hidden_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden states in what a layer or a feed-forward network returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _random_numbers_kept(module: nn.Module) -> AbstractContextManager[None]:
    """What is drawn within is drawn again behind it: dropout must be the same with the FFN and without."""
    device = next(module.parameters()).device
    # A CPU's generator is always kept; what is named is kept besides.
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


@contextmanager
def silenced(mlp: nn.Module) -> Iterator[None]:
    """Only the first token of each row enters, and nothing is added to any."""
    shapes: list[torch.Size] = []

    def shorten(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return tuple(
            value[:, :1] if isinstance(value, torch.Tensor) and value.shape[:2] == shapes[0][:2] else value
            for value in args
        )

    def nothing(mlp: nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        nil = hidden_of(output).new_zeros(shapes[0])
        return nil if isinstance(output, torch.Tensor) else (nil, *output[1:])

    handles = [mlp.register_forward_pre_hook(shorten), mlp.register_forward_hook(nothing)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
