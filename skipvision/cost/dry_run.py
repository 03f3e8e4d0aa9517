"""Run a model on shapes: floating-point tensors have only shapes; integers and booleans have values.

The meta device by itself has no integers, but image grids, masks and routing decide what is computed.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from skipvision._compat import TorchDispatchMode, tree_leaves, tree_map_only

_META = torch.device("meta")


class DryRun(TorchDispatchMode):
    """Keeps only floating-point tensors on the meta device, and all others on the CPU.

    Integers computed from a tensor without values, such as the indices of the best experts, are those of
    zeros.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._literals = _Literals()

    def __enter__(self) -> Self:
        self._literals.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._literals.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        places = {leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if kwargs.get("device") != _META and True not in places:
            return func(*args, **kwargs)
        try:
            if False in places:
                shapes = func(*_without_values(args), **_without_values(kwargs))
            else:
                shapes = func(*args, **kwargs)
            if all(leaf is None or _may_be_meta(leaf) for leaf in tree_leaves(shapes)):
                return shapes
        except RuntimeError:
            pass  # The shape depends on values.
        if kwargs.get("device") == _META:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return tree_map_only(torch.Tensor, _to_meta, func(*_as_zeros(args), **_as_zeros(kwargs)))


class _Literals(TorchFunctionMode):
    """Keeps the values of literals such as ``torch.tensor([[1, 4, 4]], device="meta")``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device) != _META:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": "cpu"}).to(_META)


def _may_be_meta(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_META) if _may_be_meta(tensor) else tensor


def _without_values(tree: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(_META), tree)


def _as_zeros(tree: Any) -> Any:
    def zeros(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") if tensor.is_meta else tensor

    return tree_map_only(torch.Tensor, zeros, tree)
