"""What the decoder's first layers think of each token, read from one early run that ends there.

Two readings: how much an FFN changes a token (`ffn_ratio`, METHOD piece 1), and how much attention the
prompt's last token pays it (`prompt_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from skipvision.anatomy.attention import read


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

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _random_numbers_kept(module):
            seen.append(hidden_of(module.forward(*args, **kwargs)))
        with silenced(mlp):
            seen.append(hidden_of(module.forward(*args, **kwargs)))

    _run_up_to(decoder, layer, note, call)
    changed, unchanged = (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) for hidden in seen)
    length = unchanged.norm(dim=-1).clamp(min=torch.finfo(unchanged.dtype).tiny)
    return (changed - unchanged).norm(dim=-1) / length


@torch.no_grad()
def prompt_attention(
    decoder: nn.Module, attention: nn.Module, call: dict[str, Any], real: torch.Tensor, prompt: torch.Tensor
) -> torch.Tensor:
    """(B, T) attention that each token receives from the last token of its row's prompt, mean over heads.

    FastV's criterion (ECCV 2024, arXiv 2403.06764), but not its schedule: FastV lets all tokens through its
    first K layers, scores them there, and drops behind layer K, so that what was dropped has been seen.
    Here the first layers are run as a probe, and the plan holds from layer 0 on. With equal counts that
    is cheaper by the first K layers of full length, and dearer by the probe. Only this one query's row of
    weights is computed, whatever the attention implementation.

    Args:
        decoder: text decoder.
        attention: of the layer to read.
        call: keyword arguments of the decoder's call; its cache is left alone.
        real: (B, T) tokens that are not padding.
        prompt: (B, T) of these, the ones that are not generated; the last one asks.
    """
    seen: list[torch.Tensor] = []
    place = torch.arange(real.shape[1], device=real.device)
    last = (prompt * place).amax(dim=1, keepdim=True)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(read(module, args, kwargs).received(last, real & (place <= last)))

    _run_up_to(decoder, attention, note, call)
    return seen[0]


_Note = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _run_up_to(decoder: nn.Module, module: nn.Module, note: _Note, call: dict[str, Any]) -> None:
    """Run a decoder without its cache until it calls ``module``, and let ``note`` have that call instead."""

    # A compiled layer does not see hooks that are put on for one call: this one layer runs as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(module, args, kwargs)
        raise _Enough

    alone = {"past_key_values": None, "use_cache": False, "output_hidden_states": False}
    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder.forward(**{**call, **alone})
    except _Enough:
        pass
    finally:
        handle.remove()


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
