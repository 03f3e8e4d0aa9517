"""The cost of a model's parts, per token and per image, measured on the model without weights.

There is no formula for any architecture. The model is built from its config and run at a few short lengths,
without values (`DryRun`), and its FLOPs are counted. So low-rank attention, mixtures of experts, unequal
layers and towers of any kind cost what they execute.
"""

from __future__ import annotations

import copy
import inspect
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from skipvision.anatomy.cache_layers import cached_values, states_of
from skipvision.anatomy.encoding import encoded_sizes
from skipvision.anatomy.families import dissect, lm_head
from skipvision.anatomy.pictures import Request, collate, recipe_of
from skipvision.anatomy.probe import EarlyRun, Probe, hidden_of
from skipvision.anatomy.tower import hook_tower
from skipvision.cost.dry_run import DryRun
from skipvision.cost.fitted import SHORT, Flops, ProbeFlops
from skipvision.cost.flops import measure_flops
from skipvision.cost.running import Built, Design, Numbers, Stop, built, end_of, run, training_mode, with_lora

_TOKENS = 256
"""Visual tokens of an image in families that keep its size (448 × 448 pixels at 28 per token)."""
_TRIES = 4
"""How often another size of image is tried if the first does not have the requested tokens."""


class CacheLayer(NamedTuple):
    """The KV cache of one layer: values per token, and its window in tokens."""

    values: int
    window: float


def weights(design: Design) -> int:
    """Count the parameters of the whole model."""
    return built(design).weights


def hidden_size(design: Design) -> int:
    """Return the width of the decoder."""
    return built(design).anatomy.hidden_size


def head(design: Design) -> int:
    """Count the FLOPs of the LM head for one token."""
    return 2 * cast(Any, lm_head(built(design).whole)).weight.numel()


def head_sees_all(design: Design) -> bool:
    """Return whether the LM head runs over the whole prompt, because the family has no ``logits_to_keep``."""
    return "logits_to_keep" not in inspect.signature(built(design).whole.forward).parameters


def decoder(design: Design, skipping: Numbers = None, last: int | None = None) -> Flops:
    """Measure one forward through the decoder.

    Args:
        design: the model's.
        skipping: layers whose feed-forward networks only some tokens enter; None = all.
        last: layer to end with; None = the decoder's last.
    """
    return _decoder(design, skipping, last)  # one key in the cache, however the arguments are passed


@lru_cache(maxsize=64)
def _decoder(design: Design, skipping: Numbers, last: int | None) -> Flops:
    model = built(design)
    forward = partial(_forward, model, end_of(model, last))
    return Flops.fitted(partial(forward, skipping=skipping), model.chunk)


@lru_cache(maxsize=64)
def probing(design: Design, probe: Probe, layer: int, rank: int) -> ProbeFlops:
    """Measure a criterion's probe of a layer, in a decoder with LoRA."""
    model = built(design)
    anatomy = model.anatomy

    def run(tokens: int) -> None:
        real = torch.ones(1, tokens, dtype=torch.bool)

        def read(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            probe.read(EarlyRun(decoder, anatomy.layers[layer], kwargs, real, real))
            raise Stop

        handle = anatomy.decoder.register_forward_pre_hook(read, with_kwargs=True)
        try:
            _forward(model, anatomy.decoder, tokens, tokens)
        finally:
            handle.remove()

    with with_lora(anatomy, rank):
        return ProbeFlops.fitted(run, model.chunk)


@lru_cache(maxsize=64)
def tower_attention(design: Design, count: int) -> int:
    """Measure how much reading the vision tower's attention adds, for the images of a row."""
    handles = hook_tower(built(design).anatomy, lambda: True)
    try:
        # Uncached: the hooks are not part of the design.
        reading, _ = _shown.__wrapped__(design, count, _near_square(_TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    return reading - _shown(design, count, _near_square(_TOKENS))[0]


def training(
    design: Design, rank: int, below: bool, skipping: Numbers = None, last: int | None = None
) -> Flops:
    """Measure one forward and backward through the decoder.

    Args:
        design: the model's.
        rank, below: as in `running.training_mode`.
        skipping, last: as in `decoder`.
    """
    return _training(design, rank, below, skipping, last)


@lru_cache(maxsize=64)
def _training(design: Design, rank: int, below: bool, skipping: Numbers, last: int | None) -> Flops:
    model = built(design)
    end = end_of(model, last)

    def step(tokens: int, ffn_tokens: int) -> None:
        with torch.enable_grad():  # whatever the caller has set
            output = run(model, end, tokens, ffn_tokens, skipping)
            hidden_of(output if last is not None else output.last_hidden_state).sum().backward()

    with training_mode(model, rank, below):
        return Flops.fitted(step, model.chunk)


@lru_cache(maxsize=64)
def cache(design: Design) -> tuple[CacheLayer, ...]:
    """Measure the KV cache of a prompt, layer by layer."""
    model = built(design)
    with DryRun(), torch.no_grad():
        kept = run(model, model.anatomy.decoder, SHORT, SHORT, use_cache=True).past_key_values
    return tuple(
        CacheLayer(
            sum(states.numel() for states in entries.values()) // SHORT,
            layer.sliding_window - 1 if type(layer) is DynamicSlidingWindowLayer else math.inf,
        )
        for layer in kept.layers
        if (entries := cached_values(layer))
    )


@lru_cache(maxsize=64)
def state_bytes(design: Design, dtype: torch.dtype) -> int:
    """Count the bytes of the states that recurrent layers keep of a sequence, however long it is.

    A state may be float32 in a model of another ``dtype``, so a model of that dtype is run.
    """
    model = built(design)
    if not any(layer.recurrent for layer in model.anatomy.layers):
        return 0
    whole = copy.deepcopy(model.whole).to(dtype)  # type: ignore[arg-type]
    model = Built(whole, dissect(whole), model.weights)
    with DryRun(), torch.no_grad():
        kept = run(model, model.anatomy.decoder, SHORT, SHORT, use_cache=True).past_key_values
    layers = (layer for layer in kept.layers if isinstance(layer, LinearAttentionLayer))
    return sum(state.nbytes for layer in layers for state in states_of(layer) if state is not None)


@lru_cache(maxsize=64)
def images(design: Design, count: int, tokens: int | None) -> tuple[int, tuple[int, ...]]:
    """Measure the FLOPs of encoding a row's images together, and the visual tokens of each.

    A family that keeps the size of images gets images of ``tokens`` visual tokens; any other gets them as its
    image processor cuts them.
    """
    if not count:
        return 0, ()
    size = tokens or _TOKENS
    shown = _shown(design, count, _near_square(size))
    # Some families add tokens, for example at the ends of lines: try smaller images.
    for _ in range(_TRIES):
        surplus = sum(shown[1]) // count - (tokens or size)
        if tokens is None or not surplus:
            break
        size = max(1, size - surplus)
        nearer = _shown(design, count, _broad(size))
        if abs(sum(nearer[1]) - count * tokens) < abs(sum(shown[1]) - count * tokens):
            shown = nearer
    return shown


@lru_cache(maxsize=64)
def _shown(design: Design, count: int, grid: tuple[int, int]) -> tuple[int, tuple[int, ...]]:
    model_type, (_, anatomy, _) = design.config.model_type, built(design)
    recipe = recipe_of(model_type, inspect.signature(anatomy.outer.get_image_features).parameters)  # type: ignore[arg-type]
    request = Request(design.config, 1, count, torch.Generator(), torch.float32, grid)
    # Pixels have values, because towers skip black tiles.
    call = collate(model_type, [[recipe(request) for _ in range(count)]])
    sizes: list[int] = []
    with DryRun(), torch.no_grad():
        flops = measure_flops(lambda: sizes.extend(encoded_sizes(anatomy.outer, call)))
    return flops, (sum(sizes) // count,) * count if anatomy.family.tiles else tuple(sizes)


def _near_square(tokens: int) -> tuple[int, int]:
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def _broad(limit: int) -> tuple[int, int]:
    """Return the largest grid of at most ``limit`` tokens that is at most twice as wide as high."""
    grids = (_near_square(tokens) for tokens in range(limit, 0, -1))
    return next((rows, columns) for rows, columns in grids if columns <= 2 * rows)


def _forward(model: Built, end: nn.Module, tokens: int, ffn_tokens: int, skipping: Numbers = None) -> None:
    with torch.no_grad():
        run(model, end, tokens, ffn_tokens, skipping)
