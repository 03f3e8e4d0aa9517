"""Criteria that read the decoder's first layers, in a run over the unreduced sequence that ends early.

Two readings: how much an FFN changes a token (`ffn_ratio`), and how much attention the prompt's last token
pays it (`prompt_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from skipvision.anatomy.attention import check_readable, read, unreadable
from skipvision.anatomy.families import Layer
from skipvision.errors import UnsupportedModelError

Note = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
"""Receives the call of a module: the module and its arguments."""


class _Stop(Exception):
    """Ends the early run once its module is called."""


@dataclass(frozen=True, eq=False)
class EarlyRun:
    """A decoder run over the caller's B rows of T tokens that stops at one module.

    Attributes:
        decoder: text decoder.
        layer: the layer to read.
        call: keyword arguments of the decoder's call; a run leaves its cache alone.
        real: (B, T) tokens that are not padding.
        prompt: (B, T) of these, the tokens that are not generated.
    """

    decoder: nn.Module
    layer: Layer
    call: dict[str, Any]
    real: torch.Tensor
    prompt: torch.Tensor

    def up_to(self, module: nn.Module, note: Note) -> None:
        """Run without cache until the decoder calls ``module``, and call ``note`` in its place."""

        # A compiled layer ignores hooks added for one call: this layer runs uncompiled.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(module, args, kwargs)
            raise _Stop

        alone = {"past_key_values": None, "use_cache": False, "output_hidden_states": False}
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.decoder.forward(**{**self.call, **alone})
        except _Stop:
            pass
        finally:
            handle.remove()


class Probe(NamedTuple):
    """How a criterion reads the decoder.

    Attributes:
        read: returns (B, T) readings of an early run.
        check: raises `UnsupportedModelError` if a layer cannot be read; runs when Skip-Vision is attached.
    """

    read: Callable[[EarlyRun], torch.Tensor]
    check: Callable[[Layer], None] = lambda layer: None


@torch.no_grad()
def ffn_ratio(run: EarlyRun) -> torch.Tensor:
    """(B, T) ‖h′ − h‖ / ‖h‖ at the run's layer, which has a feed-forward network.

    h′ is the layer's output and h its output without the FFN's, whatever the family does to an FFN's output
    before adding it.
    """
    seen: list[torch.Tensor] = []
    mlp = _present(run.layer.mlp, run.layer)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _random_state_kept(module):
            seen.append(hidden_of(module.forward(*args, **kwargs)))
        with zero_output(mlp):
            seen.append(hidden_of(module.forward(*args, **kwargs)))

    run.up_to(run.layer.whole, note)
    # Hyper-connections have several streams for each token.
    changed, unchanged = (
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)).flatten(2) for hidden in seen
    )
    length = unchanged.norm(dim=-1).clamp(min=torch.finfo(unchanged.dtype).tiny)
    return (changed - unchanged).norm(dim=-1) / length


@torch.no_grad()
def prompt_attention(run: EarlyRun) -> torch.Tensor:
    """(B, T) attention that each token receives from the last token of its row's prompt, mean over heads.

    FastV's criterion (ECCV 2024, arXiv 2403.06764), with another schedule. FastV runs all tokens through its
    first K layers, scores them there, and drops tokens after layer K, so layers have seen what is dropped.
    Here the first layers run as a probe, and the plan holds from layer 0 on. With equal counts this saves
    the first K layers at full length and costs the probe. Only this one query's row of weights is computed,
    whatever the attention implementation.
    """
    seen: list[torch.Tensor] = []
    position = torch.arange(run.real.shape[1], device=run.real.device)
    last = (run.prompt * position).amax(dim=1, keepdim=True)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(read(module, args, kwargs).received(last, run.real & (position <= last)))

    run.up_to(_present(run.layer.attention, run.layer), note)
    return seen[0]


def check_attention(layer: Layer) -> None:
    """Raise `UnsupportedModelError` if a layer's attention cannot be read."""
    attention = _present(layer.attention, layer)
    if layer.recurrent:
        raise unreadable(attention)
    check_readable(attention)


def check_feed_forward(layer: Layer) -> None:
    """Raise `UnsupportedModelError` if a layer has no feed-forward network."""
    _present(layer.mlp, layer)


def _present(half: nn.Module | None, layer: Layer) -> nn.Module:
    if half is None:
        raise UnsupportedModelError(
            f"{type(layer.whole).__name__} has no such half: it is either attention or an FFN",
            "a layer without the half that is read",
        )
    return half


def hidden_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the hidden states in the output of a layer or a feed-forward network."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _random_state_kept(module: nn.Module) -> AbstractContextManager[None]:
    """Restore the random state on exit, so that dropout is the same with the FFN and without."""
    device = next(module.parameters()).device
    # fork_rng always keeps the CPU's generator; the meta device has none.
    if device.type in ("cpu", "meta"):
        return torch.random.fork_rng([], device_type="cpu")
    return torch.random.fork_rng([device], device_type=device.type)


@contextmanager
def zero_output(mlp: nn.Module) -> Iterator[None]:
    """Make a feed-forward network return zeros in the ``with`` block.

    To save work, it runs on the first token of each row only.
    """
    shapes: list[torch.Size] = []

    def shorten(mlp: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return tuple(
            value[:, :1] if isinstance(value, torch.Tensor) and value.shape[:2] == shapes[0][:2] else value
            for value in args
        )

    def zeros(mlp: nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
        update = hidden_of(output).new_zeros(shapes[0])
        return update if isinstance(output, torch.Tensor) else (update, *output[1:])

    handles = [mlp.register_forward_pre_hook(shorten), mlp.register_forward_hook(zeros)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
