"""Weights of linear layers in the layout that the CPU reads fastest, while an engine runs.

A decode step multiplies a few rows by every weight of the decoder, so it takes as long as reading them.
`PackedWeights` replaces the model's `nn.Linear` modules by `PackedLinear`, and restores them bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from skipvision._compat import is_intercepted, submodules
from skipvision._compat_onednn import pack, packed_linear

Packable = Callable[[torch.device, torch.dtype], bool]


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a packed weight, for inference. PEFT adapts it as any other.

    A copy of it is an ordinary `nn.Linear`. So are the copies that PEFT trains (``modules_to_save``).

    Args:
        linear: the module that it replaces. Its weight is empty until `restored`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = pack(linear.weight.detach())
        # The same parameter as before: models read their dtype and device from the first that they have.
        self.emptied = linear.weight
        self.emptied.data = linear.weight.data.new_empty(0)
        self.bias = linear.bias
        self.training = linear.training
        self._linear = (linear,)  # in a tuple, or it would be a submodule

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """An unpacked copy of the weight, for code that reads it."""
        return self.packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        return packed_linear(input, self.packed, self.bias)

    def restored(self) -> nn.Linear:
        """Return the replaced module with its weight."""
        (linear,) = self._linear
        linear.weight.data = self.packed.to_dense()
        return linear

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        copied = copy.deepcopy(self._linear[0], memo)
        copied.weight.data = self.weight
        return copied


class PackedWeights:
    """Packs the weights of a model that only the engine uses, and restores them.

    Not packed: weights that two modules share, such as the LM head's if it is the embedding; weights of
    adapters, experts and convolutions; modules with hooks, and below a merged adapter.

    Args:
        model: with or without PEFT.
        packable: whether weights on a device and in a dtype are packed; None = none is.

    Attributes:
        nbytes: bytes of the packed weights.
    """

    def __init__(self, model: nn.Module, packable: Packable | None) -> None:
        self._model, self._packable = model, packable
        self.nbytes = 0

    def pack(self) -> None:
        """Pack every weight that is not packed yet. One weight at a time exists twice."""
        if self._packable is None:
            return
        uses = Counter(
            id(own)
            for module in self._model.modules()
            for _, own in module.named_parameters(recurse=False, remove_duplicate=False)
        )
        replaced: dict[nn.Module, PackedLinear] = {}
        for parent, name, child in list(_children(self._model)):
            if child not in replaced and type(child) is nn.Linear and uses[id(child.weight)] == 1:
                if not self._packable(child.weight.device, child.weight.dtype) or is_intercepted(child):
                    continue
                replaced[child] = PackedLinear(child)
                self.nbytes += replaced[child].packed.nbytes
            if child in replaced:
                setattr(parent, name, replaced[child])

    def unpack(self) -> None:
        """Put the modules back that `pack` has replaced, with their weights."""
        restored: dict[nn.Module, nn.Linear] = {}
        for module in list(self._model.modules()):
            for name, child in submodules(module).items():
                if isinstance(child, PackedLinear):
                    if child not in restored:
                        restored[child] = child.restored()
                    setattr(module, name, restored[child])
        self.nbytes = 0


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield all modules below one, each with its parent and its name there, except those of adapters."""
    for name, child in submodules(module).items():
        if isinstance(module, BaseTunerLayer) and (name != "base_layer" or module.merged):
            continue
        if isinstance(module, ModulesToSaveWrapper) and name != "original_module":
            continue
        if child is not None:
            yield module, name, child
            yield from _children(child)
