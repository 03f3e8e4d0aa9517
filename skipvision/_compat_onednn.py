"""Private names of PyTorch's oneDNN backend that the package uses, and the version they were last seen in.

A product of few rows takes as long as reading its weight. oneDNN reads a bfloat16 weight in blocks of its own
layout at about twice the speed of the ordinary one.
"""

from __future__ import annotations

import torch

__all__ = ["multiplies_packed", "pack", "packed_linear"]

_OPS = torch.ops.mkldnn  # Seen in: torch 2.13


def multiplies_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether packed weights of this dtype exist here, and the hardware multiplies it natively.

    oneDNN emulates bfloat16 on CPUs without AVX512-BF16; all with AMX have it, too. It packs float32 as well,
    but sums that in another order.
    """
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(_OPS, "_linear_pointwise")
        and torch.cpu._is_avx512_bf16_supported()  # Seen in: torch 2.13
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Copy an (out, in) weight into oneDNN's layout; ``to_dense()`` restores it exactly."""
    packed: torch.Tensor = _OPS._reorder_linear_weight(weight)
    return packed


def packed_linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply (…, in) values by a packed (out, in) weight and add the bias, as `F.linear` does."""
    output: torch.Tensor = _OPS._linear_pointwise(values, weight, bias, "none", [], "")
    return output
