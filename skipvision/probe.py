"""FFN magnitude ratio: how much the FFN changes each token, read from one early run (METHOD piece 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Enough(Exception):
    """Ends the probing run: the layers behind the probed one need not be computed."""


@torch.no_grad()
def ffn_ratio(decoder: nn.Module, number: int, mlp: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """(B, T) ‖FFN(norm(h))‖ / ‖h‖ at one decoder layer, over the unreduced input.

    The decoder runs as it is up to the layer and no further. h is the residual stream the FFN adds
    to, recovered from the layer's output: h = output − FFN(norm(h)).

    Args:
        decoder: text decoder.
        number: the layer to read.
        mlp: its feed-forward network.
        call: keyword arguments of the decoder's call; its cache is left alone.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep_update(mlp: nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen["update"] = output if isinstance(output, torch.Tensor) else output[0]

    def stop(module: nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen["output"] = output if isinstance(output, torch.Tensor) else output[0]
        raise _Enough

    handles = [
        mlp.register_forward_hook(keep_update),
        decoder.get_submodule(f"layers.{number}").register_forward_hook(stop),
    ]
    try:
        decoder(**{**call, "past_key_values": None, "use_cache": False, "output_hidden_states": False})
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    wide = torch.promote_types(seen["update"].dtype, torch.float32)
    update = seen["update"].to(wide)
    residual = seen["output"].to(wide) - update
    return update.norm(dim=-1) / residual.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)
