"""Bytes that a forward keeps for its backward: the memory of its activations."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class KeptTensors(saved_tensors_hooks):
    """Counts the tensors that forwards in a ``with`` block keep for their backward, on any device.

    Tensors that share memory count once, and those of ``model`` itself do not count. Under activation
    checkpointing these are the inputs of the layers, without what a layer computes again.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, _unpack)
        self._own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._sizes: dict[StorageWeakRef, int] = {}

    def __enter__(self) -> Self:  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that were kept so far."""
        return sum(self._sizes.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in self._own:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
        return tensor.detach()


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
    """Return a reference that is equal for tensors that share memory, also without data."""
    return StorageWeakRef(tensor.untyped_storage())


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
