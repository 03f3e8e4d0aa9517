"""The cost of a model's parts, per token and per image, measured on the model without weights.

There is no formula for any architecture. The model is built from its config and run at a few short lengths,
without values (`DryRun`), and its FLOPs are counted. So low-rank attention, mixtures of experts, unequal
layers and towers of any kind cost what they execute.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from skipvision.anatomy.cache_layers import cached_values, states_of
from skipvision.anatomy.encoding import encoded_sizes
from skipvision.anatomy.families import Anatomy, dissect, lm_head, takes_images, text_only
from skipvision.anatomy.pictures import Request, collate, recipe_of
from skipvision.anatomy.probe import EarlyRun, Probe, hidden_of
from skipvision.anatomy.tower import hook_tower
from skipvision.cost.dry_run import DryRun
from skipvision.cost.fitted import CHUNK, SHORT, Flops, ProbeFlops
from skipvision.cost.flops import measure_flops
from skipvision.errors import UnsupportedModelError
from skipvision.loading import NO_IMAGE_MODEL, build_model

_TOKENS = 256
"""Visual tokens of an image in families that keep its size (448 × 448 pixels at 28 per token)."""
_TRIES = 4
"""How often another size of image is tried if the first does not have the requested tokens."""


@dataclass(frozen=True)
class Design:
    """A model's config, as the key of cached measurements."""

    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> Self:
        return cls(config.to_json_string(use_diff=False), config)


Numbers = tuple[int, ...] | None
"""Numbers of layers; None = of all."""


class CacheLayer(NamedTuple):
    """The KV cache of one layer: values per token, and its window in tokens."""

    values: int
    window: float


class _Model(NamedTuple):
    whole: PreTrainedModel
    anatomy: Anatomy
    weights: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, if a layer computes linear attention in chunks; else 0."""
        config = self.anatomy.text_config
        chunked = "linear_attention" in (getattr(config, "layer_types", None) or ())
        sizes = (getattr(config, name, None) for name in ("mamba_chunk_size", "chunk_size"))
        return next((size for size in sizes if size), CHUNK) if chunked else 0


class _Stop(Exception):
    """Ends a run of the model once it has computed what is measured."""


def weights(design: Design) -> int:
    """Count the parameters of the whole model."""
    return _model(design).weights


def hidden_size(design: Design) -> int:
    """Return the width of the decoder."""
    return _model(design).anatomy.hidden_size


def head(design: Design) -> int:
    """Count the FLOPs of the LM head for one token."""
    return 2 * cast(Any, lm_head(_model(design).whole)).weight.numel()


def head_sees_all(design: Design) -> bool:
    """Return whether the LM head runs over the whole prompt, because the family has no ``logits_to_keep``."""
    return "logits_to_keep" not in inspect.signature(_model(design).whole.forward).parameters


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
    model = _model(design)
    run = partial(_forward, model, _end(model, last))
    return Flops.fitted(partial(run, skipping=skipping), model.chunk)


@lru_cache(maxsize=64)
def probing(design: Design, probe: Probe, layer: int, rank: int) -> ProbeFlops:
    """Measure a criterion's probe of a layer, in a decoder with LoRA."""
    model = _model(design)
    anatomy = model.anatomy

    def run(tokens: int) -> None:
        real = torch.ones(1, tokens, dtype=torch.bool)

        def read(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            probe.read(EarlyRun(decoder, anatomy.layers[layer], kwargs, real, real))
            raise _Stop

        handle = anatomy.decoder.register_forward_pre_hook(read, with_kwargs=True)
        try:
            _forward(model, anatomy.decoder, tokens, tokens)
        finally:
            handle.remove()

    with _lora(anatomy, rank):
        return ProbeFlops.fitted(run, model.chunk)


@lru_cache(maxsize=64)
def tower_attention(design: Design, count: int) -> int:
    """Measure how much reading the vision tower's attention adds, for the images of a row."""
    handles = hook_tower(_model(design).anatomy, lambda: True)
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
        rank: rank of the LoRA on every linear layer of the decoder; 0 = the decoder itself trains.
        below: whether parameters below the first layer train too.
        skipping, last: as in `decoder`.
    """
    return _training(design, rank, below, skipping, last)


@lru_cache(maxsize=64)
def _training(design: Design, rank: int, below: bool, skipping: Numbers, last: int | None) -> Flops:
    model = _model(design)
    anatomy = model.anatomy
    end = _end(model, last)

    def step(tokens: int, ffn_tokens: int) -> None:
        with torch.enable_grad():  # whatever the caller has set
            output = _run(model, end, tokens, ffn_tokens, skipping)
            hidden_of(output if last is not None else output.last_hidden_state).sum().backward()

    def from_below(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeds.detach().requires_grad_() if below else embeds}

    handle = anatomy.decoder.register_forward_pre_hook(from_below, with_kwargs=True)
    anatomy.decoder.requires_grad_(not rank)
    try:
        with _lora(anatomy, rank):
            return Flops.fitted(step, model.chunk)
    finally:
        handle.remove()
        anatomy.decoder.requires_grad_(False).zero_grad()


@lru_cache(maxsize=64)
def cache(design: Design) -> tuple[CacheLayer, ...]:
    """Measure the KV cache of a prompt, layer by layer."""
    model = _model(design)
    with DryRun(), torch.no_grad():
        kept = _run(model, model.anatomy.decoder, SHORT, SHORT, use_cache=True).past_key_values
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
    model = _model(design)
    if not any(layer.recurrent for layer in model.anatomy.layers):
        return 0
    whole = copy.deepcopy(model.whole).to(dtype)  # type: ignore[arg-type]
    model = _Model(whole, dissect(whole), model.weights)
    with DryRun(), torch.no_grad():
        kept = _run(model, model.anatomy.decoder, SHORT, SHORT, use_cache=True).past_key_values
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
    model_type, (_, anatomy, _) = design.config.model_type, _model(design)
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


@lru_cache(maxsize=4)
def _model(design: Design) -> _Model:
    config = type(design.config).from_dict(design.config.to_dict())
    try:
        with DryRun(), torch.device("meta"):
            model = build_model(
                config, dtype=torch.float32, attn_implementation="eager", experts_implementation="batched_mm"
            )
    except ValueError as error:
        name = type(design.config).__name__
        if not takes_images(design.config):
            raise text_only(name) from None
        if NO_IMAGE_MODEL in str(error):
            raise UnsupportedModelError(
                f"{name} is not the config of an image-text-to-text model of transformers: pass the config "
                "of the whole model (model.config)"
            ) from None
        raise UnsupportedModelError(f"{name}: {error}") from error
    model.eval().requires_grad_(False)
    return _Model(model, dissect(model), sum(parameter.numel() for parameter in model.parameters()))


def _end(model: _Model, last: int | None) -> nn.Module:
    return model.anatomy.decoder if last is None else model.anatomy.layers[last].whole


def _forward(model: _Model, end: nn.Module, tokens: int, ffn_tokens: int, skipping: Numbers = None) -> None:
    with torch.no_grad():
        _run(model, end, tokens, ffn_tokens, skipping)


def _run(
    model: _Model,
    end: nn.Module,
    tokens: int,
    ffn_tokens: int,
    skipping: Numbers = None,
    use_cache: bool = False,
) -> Any:
    """Run a text of ``tokens``; return the output of ``end``.

    Only ``ffn_tokens`` of the tokens enter the FFNs of the layers ``skipping``, None = of all.
    """
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Stop

    with ExitStack() as stack:
        for number, layer in enumerate(model.anatomy.layers if ffn_tokens < tokens else ()):
            if layer.mlp is not None and (skipping is None or number in skipping):
                stack.enter_context(_shortened(layer.mlp, tokens, ffn_tokens))
        stack.callback(end.register_forward_hook(stop).remove)
        try:
            kept = {"past_key_values": DynamicCache(config=model.anatomy.text_config)} if use_cache else {}
            model.whole(**_text(model.whole, tokens), use_cache=use_cache, **kept)
        except _Stop:
            return outputs[0] if outputs else None
    raise UnsupportedModelError(f"{type(model.whole).__name__} does not call its {type(end).__name__}")


def _text(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return a prompt without special tokens."""
    special = {value for value in vars(model.config).values() if isinstance(value, int)}
    word = next(number for number in count() if number not in special)
    ones = torch.ones(1, tokens, dtype=torch.long)
    accepted = inspect.signature(model.forward).parameters
    types = {name: 0 * ones for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
    return {"input_ids": word * ones, "attention_mask": ones, **types}


@contextmanager
def _shortened(mlp: nn.Module, tokens: int, ffn_tokens: int) -> Iterator[None]:
    """Make only the first ``ffn_tokens`` tokens enter a feed-forward network, and add zeros to the others."""

    def cut(mlp: nn.Module, args: Any) -> Any:
        return tuple(
            value[:, :ffn_tokens]
            if isinstance(value, torch.Tensor) and value.shape[:2] == (1, tokens)
            else value
            for value in args
        )

    def pad(mlp: nn.Module, args: Any, output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        padded = F.pad(update.reshape(1, ffn_tokens, -1), (0, 0, 0, tokens - ffn_tokens))
        return (padded, *output[1:]) if isinstance(output, tuple) else padded

    handles = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _lora(anatomy: Anatomy, rank: int) -> Iterator[None]:
    """Add LoRA to every linear layer of the decoder, as PEFT runs it; nothing with rank 0."""

    def add_lora(linear: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        into = torch.empty(rank, args[0].shape[-1], device="meta", requires_grad=True)
        out = torch.empty(output.shape[-1], rank, device="meta", requires_grad=True)
        return output + F.linear(F.linear(args[0], into), out)

    layers: Any = anatomy.decoder.layers
    linears = [module for module in layers.modules() if type(module) is nn.Linear] if rank else []
    handles = [linear.register_forward_hook(add_lora) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
