"""FFN magnitude ratio: how much the FFN changes each token, read from one early run (METHOD piece 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Enough(Exception):
    """Ends the probing run: the layers behind the probed one need not be computed."""


@torch.no_grad()
def ffn_ratio(decoder: nn.Module, layer: nn.Module, mlp: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """(B, T) ‖FFN(norm(h))‖ / ‖h‖ at one decoder layer, over the unreduced input.

    The decoder runs as it is up to the layer and no further. h is the residual stream the FFN adds
    to, recovered from the layer's output: h = output − FFN(norm(h)).

    Args:
        decoder: text decoder.
        layer: the layer to read.
        mlp: its feed-forward network.
        call: keyword arguments of the decoder's call; its cache is left alone.
    """
    seen: dict[str, torch.Tensor] = {}

    def keep_update(mlp: nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        seen["update"] = output if isinstance(output, torch.Tensor) else output[0]

    # A compiled layer does not see hooks that are put on for one call: this one layer runs as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle = mlp.register_forward_hook(keep_update)
        try:
            output = module.forward(*args, **kwargs)
        finally:
            handle.remove()
        seen["output"] = output if isinstance(output, torch.Tensor) else output[0]
        raise _Enough

    alone = {"past_key_values": None, "use_cache": False, "output_hidden_states": False}
    handle = layer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        decoder.forward(**{**call, **alone})
    except _Enough:
        pass
    finally:
        handle.remove()
    wide = torch.promote_types(seen["update"].dtype, torch.float32)
    update = seen["update"].to(wide)
    residual = seen["output"].to(wide) - update
    return update.norm(dim=-1) / residual.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)
