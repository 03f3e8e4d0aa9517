"""Lipschitz constants of the two halves of a decoder layer, from spectral norms.

Neither half is Lipschitz everywhere: dot-product attention is not (Kim, Papamakarios, Mnih 2021), nor is a
product of a gate and a value. Both are on bounded activations, and the bound is measured over the two runs
that are compared (docs/analysis.md has the mathematics). Errors have one number for each token, (T,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import nn

from skipvision.analysis.runs import Run
from skipvision.analysis.spectral import spectral_norm
from skipvision.anatomy.families import Layer
from skipvision.errors import UnsupportedModelError

_NORMS = ("input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (
    ("gate_proj", "up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
)
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_CLOSE = 1e-2


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of one supported layer.

    Attributes:
        halves: attention, and the FFN.
        norms: before attention, and before the FFN.
        projections: query, key, value and output projections.
        linear: the FFN's gate, up and down projections; or up and down.
        activation: the FFN's activation.
    """

    halves: tuple[nn.Module, nn.Module]
    norms: tuple[nn.Module, nn.Module]
    projections: tuple[nn.Module, ...]
    linear: tuple[nn.Module, ...]
    activation: nn.Module

    @classmethod
    def of(cls, layer: Layer, number: int) -> Parts:
        """Find the modules; raises `UnsupportedModelError` if some are missing, or others have weights."""
        attention, mlp = layer.attention, layer.mlp
        if attention is None or mlp is None:
            raise _unknown(layer.whole, number, "only one of attention and a feed-forward network")
        _refuse_others(layer.whole, {*_NORMS, *_names_of(layer.whole, attention, mlp)}, number)
        _refuse_others(attention, set(_PROJECTIONS), number)
        linear = next((names for names in _LINEAR if all(hasattr(mlp, name) for name in names)), _LINEAR[0])
        activation = next((getattr(mlp, name) for name in _ACTIVATIONS if hasattr(mlp, name)), None)
        _refuse_others(mlp, {*linear, *_ACTIVATIONS}, number)
        if activation is None:
            raise _unknown(mlp, number, "no activation")
        return cls(
            (attention, mlp),
            (getattr(layer.whole, _NORMS[0]), getattr(layer.whole, _NORMS[1])),
            tuple(getattr(attention, name) for name in _PROJECTIONS),
            tuple(getattr(mlp, name) for name in linear),
            activation,
        )

    @property
    def watched(self) -> list[nn.Module]:
        """Modules whose outputs are needed for the constants."""
        return [*self.halves, *self.projections[:3], *self.linear[:-1]]


class Normed:
    """How much a norm layer amplifies the error between two runs, token by token.

    Append the entry √(d ε) to the (centred) input and call it z. Before their scale, RMSNorm and LayerNorm
    are √d · z / ‖z‖, and any two vectors have ‖z/‖z‖ − z′/‖z′‖‖ ≤ 2 ‖z − z′‖ / (‖z‖ + ‖z′‖) (Dunkl, Williams
    1964).

    Args:
        norm: RMSNorm or LayerNorm.
        one: (1, T, H) its inputs in one run.
        other: (1, T, H) its inputs in the other run.

    Raises:
        UnsupportedModelError: the module computes something else.
    """

    def __init__(self, norm: nn.Module, one: torch.Tensor, other: torch.Tensor) -> None:
        self.scale, epsilon, self.centred = _formula(norm, one)
        self._width = one.shape[-1]
        lengths = [
            (_length(part[0], self.centred) ** 2 + self._width * epsilon).sqrt() for part in (one, other)
        ]
        self.factor = 2 * sqrt(self._width) / (lengths[0] + lengths[1])

    def bound(self, error: torch.Tensor) -> torch.Tensor:
        """Bound the (T,) error after the norm, before its scale. No such output is longer than √d."""
        return (self.factor * error).clamp(max=2 * sqrt(self._width))


class AttentionBound:
    """How much attention after its norm amplifies the error between two runs.

    Args:
        parts: modules of the layer.
        norm: bound of the norm before attention.
        runs: both runs.
        stretch: factor by which rotary embeddings scale queries and keys; 1 if they only rotate.
    """

    def __init__(self, parts: Parts, norm: Normed, runs: Sequence[Run], stretch: float = 1.0) -> None:
        attention: Any = parts.halves[0]
        width, scale = attention.head_dim, norm.scale
        states = [
            torch.stack([run.seen[module][0].double().unflatten(-1, (-1, width)) for run in runs])
            for module in parts.projections[:3]
        ]
        groups = states[0].shape[2] // states[1].shape[2]
        norms = [
            spectral_norm((_matrix(module, runs[0].output) * scale).unflatten(0, (-1, width)))
            for module in parts.projections[:3]
        ]
        self._query = norms[0]
        self._key, self._value = (each.repeat_interleave(groups) for each in norms[1:])
        queries, keys, values = states
        centred = values - values.mean(dim=(0, 1), keepdim=True)
        self._queries = queries.norm(dim=-1).amax(dim=(0, 1))
        self._keys, self._values = (
            part.norm(dim=-1).amax(dim=(0, 1)).repeat_interleave(groups) for part in (keys, centred)
        )
        out = _matrix(parts.projections[3], runs[0].output, queries.shape[2] * width)
        self._out = spectral_norm(out)
        self._head_out = spectral_norm(out.unflatten(1, (-1, width)).transpose(0, 1))
        self._scaling = float(attention.scaling) * stretch**2

    def bound(self, error: torch.Tensor) -> torch.Tensor:
        """Bound the (T,) error of the output, for a (T,) error of the normed input."""
        return self._through(error, limit=2.0)

    def constant(self) -> float:
        """Lipschitz constant of attention, in the maximum norm over tokens."""
        return float(self._through(torch.ones_like(self._query[:1]), limit=float("inf"))[0])

    def _through(self, error: torch.Tensor, limit: float) -> torch.Tensor:
        largest = error.max()
        # Bound of the logits' change. Softmax is 1-Lipschitz from the maximum norm to the sum norm.
        logits = self._scaling * (
            self._query * self._keys * error[:, None] + self._queries * self._key * largest
        )
        moved = self._value * largest + self._values * logits.clamp(max=limit)
        return torch.minimum(self._out * moved.norm(dim=1), (moved * self._head_out).sum(dim=1))


def ffn_constant(parts: Parts, norm: Normed, runs: Sequence[Run]) -> float:
    """Lipschitz constant of the FFN with its norm's scale, on inputs as large as in the two runs."""
    *entries, down = parts.linear
    states = [torch.cat([run.seen[module].double().flatten() for run in runs]) for module in entries]
    inner = runs[0].seen[entries[0]].shape[-1]
    norms = [float(spectral_norm(_matrix(module, runs[0].output) * norm.scale)) for module in entries]
    slope, largest = _slope_and_value(parts.activation, states[0])
    last = float(spectral_norm(_matrix(down, runs[0].output, inner)))
    if len(entries) == 1:
        return last * slope * norms[0]
    return last * (slope * norms[0] * float(states[1].abs().max()) + largest * norms[1])


def _slope_and_value(activation: nn.Module, inputs: torch.Tensor) -> tuple[float, float]:
    """Largest slope and largest absolute value of an activation over the range of its inputs."""
    grid = torch.linspace(float(inputs.min()), float(inputs.max()), 20001, dtype=torch.double)
    grid = grid.to(inputs.device).requires_grad_()
    with torch.enable_grad():
        value = activation(grid)
        [slope] = torch.autograd.grad(value.sum(), grid)
    # Add a thousandth for values between the points of the grid.
    return 1.001 * float(slope.abs().max()), 1.001 * float(value.detach().abs().max())


def _matrix(module: nn.Module, like: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """(out, in) matrix of a linear module and its adapter, computed from unit vectors."""
    inputs = torch.eye(width or like.shape[-1], dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return (module(inputs) - module(torch.zeros_like(inputs[:1]))).mT.double()


def _formula(norm: Any, example: torch.Tensor) -> tuple[torch.Tensor, float, bool]:
    """Scale, ε, and whether the norm subtracts the mean. Each combination is tried on an example."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    epsilon = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    if isinstance(weight, torch.Tensor) and isinstance(epsilon, float):
        with torch.no_grad():
            expected = norm(example).double()
            for centred in (False, True):
                vector = _centred(example.double(), centred)
                unit = vector / (vector.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
                for scale in (weight.double(), 1 + weight.double()):
                    computed = unit * scale if bias is None else unit * scale + bias.double()
                    if float((computed - expected).norm()) < _CLOSE * float(expected.norm()):
                        return scale.detach(), epsilon, centred
    raise UnsupportedModelError(
        f"{type(norm).__name__} is neither RMSNorm nor LayerNorm with elementwise weights: no error bound is "
        "known for it",
        "an unknown kind of norm",
    )


def _centred(vectors: torch.Tensor, centred: bool) -> torch.Tensor:
    return vectors - vectors.mean(dim=-1, keepdim=True) if centred else vectors


def _length(vectors: torch.Tensor, centred: bool) -> torch.Tensor:
    return _centred(vectors.double(), centred).norm(dim=-1)


def _names_of(module: nn.Module, *children: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if child in children]


def _refuse_others(module: nn.Module, known: set[str], number: int) -> None:
    """Raise `UnsupportedModelError` if other children of the module than the known ones have weights."""
    names = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    needed = {name for name in known if name not in _ACTIVATIONS}
    if names != needed:
        raise _unknown(module, number, f"{', '.join(sorted(names)) or 'no modules'} with weights")


def _unknown(module: nn.Module, number: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"layer {number}: {type(module).__name__} has {what}; a bound from spectral norms is known "
        f"for {' and '.join(_NORMS)}, attention of {', '.join(_PROJECTIONS)}, and an FFN of "
        f"{' or of '.join(', '.join(names) for names in _LINEAR)}; pass worst_case=False",
        "layers without a known bound",
    )
