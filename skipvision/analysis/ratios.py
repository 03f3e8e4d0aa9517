"""How much each layer's FFN changes visual and text tokens: the reason why it can be skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvision.anatomy.families import Layer, dissect
from skipvision.anatomy.probe import hidden_of, zero_output
from skipvision.attach import attachment_of
from skipvision.config import SkipConfig
from skipvision.errors import InputError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The levels at which `Spread.quantiles` are taken."""

_BINS = 48


@dataclass(frozen=True)
class Spread:
    """FFN ratios of one kind of token, by layer.

    Attributes:
        tokens: number of measured tokens.
        mean: mean of each layer.
        quantiles: for each layer, the values at the levels of `QUANTILES`.
        histogram: for each layer, the share of tokens in each bin of `FfnRatios.edges`.
    """

    tokens: int
    mean: list[float]
    quantiles: list[list[float]]
    histogram: list[list[float]]


@dataclass(frozen=True)
class FfnRatios:
    """‖h′ − h‖ / ‖h‖ of visual and text tokens: h′ is a layer's output, h the same without its FFN.

    Attributes:
        visual: ratios of visual tokens.
        text: ratios of all other tokens.
        edges: edges of the histograms' bins, in equal logarithmic steps.
    """

    visual: Spread
    text: Spread
    edges: list[float]


@torch.no_grad()
def ffn_ratios(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> FfnRatios:
    """Measure the FFN ratios of every layer that has an FFN, with full tokens.

    An attached Skip-Vision is paused meanwhile.

    Args:
        model: any supported model, in eval mode.
        batches: inputs of prompts with images, on the model's device.

    Raises:
        UnsupportedModelError: the model is not supported.
        InputError: the batches have no visual tokens, or no text tokens.
    """
    anatomy = dissect(model)
    visual: list[torch.Tensor] = []
    text: list[torch.Tensor] = []
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        is_visual = (ids == anatomy.image_token_id) & real
        with full_tokens(model), _measuring(anatomy.layers) as found:
            model(**{**batch, "use_cache": False})
        ratios = torch.stack(found).float().cpu()
        visual.append(ratios[:, is_visual.cpu()])
        text.append(ratios[:, (real & ~is_visual).cpu()])
    if not sum(part.shape[1] for part in visual) or not sum(part.shape[1] for part in text):
        raise InputError(
            f"{len(visual)} batches lack visual tokens or text tokens: pass prompts with text and images"
        )
    together = torch.cat(visual, dim=1), torch.cat(text, dim=1)
    edges = _edges(torch.cat(together, dim=1))
    of_visual, of_text = (_spread(part, edges) for part in together)
    return FfnRatios(of_visual, of_text, edges.tolist())


@contextmanager
def full_tokens(model: nn.Module) -> Iterator[None]:
    """Run the model with full tokens in the ``with`` block, even if Skip-Vision is attached."""
    attachment = attachment_of(model)
    with nullcontext() if attachment is None else attachment.using(SkipConfig.full()):
        yield


@contextmanager
def _measuring(layers: Iterable[Layer]) -> Iterator[list[torch.Tensor]]:
    """Collect the (B, T) ratios of each layer that runs in the ``with`` block."""
    found: list[torch.Tensor] = []

    def hook(mlp: nn.Module) -> Any:
        def measure(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            with zero_output(mlp):
                without = hidden_of(layer.forward(*args, **kwargs)).float().flatten(2)
            length = without.norm(dim=-1).clamp(min=torch.finfo(without.dtype).tiny)
            found.append((hidden_of(output).float().flatten(2) - without).norm(dim=-1) / length)

        return measure

    handles = [
        layer.whole.register_forward_hook(hook(layer.mlp), with_kwargs=True)
        for layer in layers
        if layer.mlp is not None
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _edges(ratios: torch.Tensor) -> torch.Tensor:
    """Edges of bins from the smallest positive ratio to the largest. Zeros count in the first bin."""
    some = ratios[ratios > 0]
    low, high = (some.min().log10(), some.max().log10()) if some.numel() else (torch.tensor(0.0),) * 2
    return torch.logspace(float(low) - 1e-3, float(high) + 1e-3, _BINS + 1)


def _spread(ratios: torch.Tensor, edges: torch.Tensor) -> Spread:
    """Summarise ratios of shape (layers, tokens) by layer."""
    bins = (torch.bucketize(ratios, edges) - 1).clamp(0, len(edges) - 2)
    histogram = torch.zeros(len(ratios), len(edges) - 1)
    histogram.scatter_add_(1, bins, torch.ones_like(ratios))
    ranked = ratios.sort(dim=1).values
    # As torch.quantile with "nearest", which is limited to 16 million numbers.
    at = [round(share * (ratios.shape[1] - 1)) for share in QUANTILES]
    return Spread(
        tokens=ratios.shape[1],
        mean=ratios.mean(dim=1).tolist(),
        quantiles=ranked[:, at].tolist(),
        histogram=(histogram / ratios.shape[1]).tolist(),
    )
