"""The cost of a configuration, predicted from configs alone: FLOPs and KV bytes.

FLOPs are two per multiply-add of matrix products and convolutions (`measure_flops`). Attention counts as it
is executed, over the full square of the sequence, and its backward as twice its forward. `units` measures the
cost of one token, pair or image in a family; this module multiplies it by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from skipvision.config import SkipConfig
from skipvision.cost import activations
from skipvision.cost import units as unit_costs
from skipvision.cost.fitted import Flops
from skipvision.cost.running import Design
from skipvision.errors import ConfigError


@dataclass(frozen=True)
class Ratio:
    """The fields of a `Cost` as fractions of the full-token cost."""

    prefill_flops: float
    decode_flops: float
    train_flops: float
    kv_bytes: float


@dataclass(frozen=True)
class Cost:
    """The cost of one row.

    Attributes:
        prefill_flops: vision tower, planning (probe included), decoder, and LM head at the last position, or
            at all positions in a family that cannot leave them out. LoRA counts as merged.
        decode_flops: the ``new_tokens − 1`` steps after the prefill.
        train_flops: forward and backward of one training step over prompt and answer, with the LM head at the
            answer's positions and the vision tower frozen.
        kv_bytes: keys and values in the cache right after prefill.
        planning_flops: the part of ``prefill_flops`` for select, merge, probe and summary.
        vision_flops: the part of ``prefill_flops`` for vision tower and projector.
        weight_bytes: bytes of the whole model.
        sequence: length of the reduced prompt.
        full: the cost without Skip-Vision; None on the full cost itself.
        teacher_flops: one forward of the base model with all visual tokens over prompt and answer, with the
            LM head at the answer's positions. Self-distillation adds it to ``train_flops``.
        state_bytes: states of recurrent layers (linear attention, short convolutions), which are of fixed
            size, with Skip-Vision and without.
        activation_bytes: activations that one training row keeps from its forward to its backward, with fused
            attention and without checkpointing.
    """

    prefill_flops: int
    decode_flops: int
    train_flops: int
    kv_bytes: int
    planning_flops: int
    vision_flops: int
    weight_bytes: int
    sequence: int
    full: Cost | None = None
    teacher_flops: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0

    @property
    def ratio_to_full(self) -> Ratio:
        """Each field of `Ratio`, divided by the full-token cost."""
        full = self.full or self
        return Ratio(
            **{
                f.name: getattr(self, f.name) / getattr(full, f.name) if getattr(full, f.name) else 1.0
                for f in fields(Ratio)
            }
        )


def predict_cost(
    model_config: PretrainedConfig,
    config: SkipConfig | None,
    *,
    images: int = 1,
    text_tokens: int = 64,
    new_tokens: int = 32,
    visual_tokens: int | None = None,
    lora_rank: int = 16,
    dtype: torch.dtype | None = None,
    training: bool = True,
) -> Cost:
    """Predict the cost of one row, without weights.

    The first call for a model config measures the family's parts, which takes seconds, or minutes for a
    large decoder with linear attention; later calls are quick.

    Args:
        model_config: the whole model's config (``model.config``).
        config: None or ``SkipConfig.full()`` for full tokens.
        images: images in the row.
        text_tokens: prompt tokens that are not visual.
        new_tokens: tokens generated; in training, the answer's tokens.
        visual_tokens: N per image. By default, that of an image at the vision tower's size, cut into three
            where the family cuts images into tiles or views; 256 in a family that keeps the size of images.
            A family that keeps the size is measured with images of N tokens; in any other, encoding costs in
            proportion to N. Several images are measured together: some towers see them as one sequence.
        lora_rank: rank of the LoRA on every linear layer of the decoder; 0 = full fine-tuning of the
            decoder.
        dtype: dtype of weights and KV cache; by default the config's.
        training: also measure a training step, which takes most of the first call's time; without it
            ``train_flops`` and ``activation_bytes`` are 0.

    Raises:
        UnsupportedModelError: Skip-Vision does not support the family.
        ConfigError: a number of tokens, images or ranks is negative or not an integer.
    """
    _check_counts(images=images, text_tokens=text_tokens, new_tokens=new_tokens, lora_rank=lora_rank)
    if visual_tokens is not None:
        _check_counts(visual_tokens=visual_tokens)
    design = Design.of(model_config)
    encoding, sizes = unit_costs.images(design, images, visual_tokens)
    if visual_tokens is not None and images:
        encoding = encoding * images * visual_tokens // sum(sizes)
        each = sizes[: max(len(sizes) // images, 1)]
        joined = len(sizes) == 1  # In some families all images of a row are one.
        sizes = (images * visual_tokens,) if joined else images * _resized(each, visual_tokens)
    row = _Row(sizes, text_tokens, new_tokens, encoding)
    saved_in = model_config.dtype
    element = dtype or (saved_in if isinstance(saved_in, torch.dtype) else torch.float32)
    rank = lora_rank if training else None
    full = _cost(design, SkipConfig.full(), row, rank, element, None)
    return full if config is None else _cost(design, config, row, rank, element, full)


def predict_activations(
    model_config: PretrainedConfig,
    config: SkipConfig | None,
    *,
    visual_tokens: Sequence[int],
    text_tokens: int,
    new_tokens: int,
    lora_rank: int,
    dtype: torch.dtype,
) -> int:
    """Predict `Cost.activation_bytes` alone, which takes less time than a whole `Cost`.

    Args:
        model_config, config, text_tokens, new_tokens, lora_rank: as in `predict_cost`.
        visual_tokens: of each image of the row.
        dtype: dtype of the matrix products.

    Raises:
        UnsupportedModelError: Skip-Vision does not support the family.
    """
    row = _Row(tuple(visual_tokens), text_tokens, new_tokens, 0)
    return _kept(Design.of(model_config), config or SkipConfig.full(), row, lora_rank, dtype)


@dataclass(frozen=True)
class _Row:
    """The contents of a row: visual tokens of each image, tokens of text and of the answer."""

    sizes: tuple[int, ...]
    text: int
    new: int
    vision_flops: int

    @property
    def prompt(self) -> int:
        """Length of the unreduced prompt."""
        return sum(self.sizes) + self.text


def _resized(sizes: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Resize an image to ``tokens``: into tiles as before, if the tiles divide them."""
    tile = sizes[-1]
    return (
        sizes
        if tokens == sum(sizes)
        else (tile,) * (tokens // tile)
        if len(sizes) > 1 and not tokens % tile
        else (tokens,)
    )


def _cost(
    design: Design, config: SkipConfig, row: _Row, rank: int | None, element: torch.dtype, full: Cost | None
) -> Cost:
    """Add up the cost of a row; a ``rank`` of None leaves out training."""
    counts = [config.counts(size) for size in row.sizes]
    skipped = sum(one.skipped for one in counts)
    prompt = sum(one.total for one in counts) + row.text
    short, forgotten = skipped * config.skip_ffn, skipped * config.skip_kv
    cached = prompt - forgotten
    left = sum(one.summaries for one in counts) + row.text if config.drop_after is not None else cached
    measure = partial(_parts, config, short > 0)
    decoder, head = measure(partial(unit_costs.decoder, design)), unit_costs.head(design)
    everywhere = unit_costs.head_sees_all(design)
    planning = _planning(design, config, row, 0, 0)
    prefill = row.vision_flops + planning + decoder(_square(prompt, short), _square(left))
    prefill += (row.prompt if everywhere else 1) * head

    layers = unit_costs.cache(design)
    first, later = layers, layers[:0]
    if config.drop_after is not None:
        first, later = layers[: config.drop_after + 1], layers[config.drop_after + 1 :]
    reduced = prompt != row.prompt or short > 0 or forgotten > 0 or left < cached

    def kept(fed: int, window: float) -> int:
        """Entries in a layer's cache; a pruned cache keeps no window."""
        return fed if reduced else int(min(fed, window))

    def step(fed: int, layers: tuple[unit_costs.CacheLayer, ...]) -> _Sequence:
        return _Sequence(1, sum(kept(fed, layer.window) + 1 for layer in layers) // max(len(layers), 1), 1)

    decode = 0
    for new in range(row.new - 1):
        decode += decoder(step(cached + new, first), step(left + new, later)) + head

    train, activation, unreduced = 0, 0, row.prompt + row.new
    if rank is not None:
        train = row.vision_flops + _planning(design, config, row, row.new, rank)
        trained = measure(partial(unit_costs.training, design, rank, config.summary_tokens > 0))
        train += trained(_square(prompt + row.new, short), _square(left + row.new))
        train += (2 if rank else 3) * (unreduced if everywhere else row.new) * head
        activation = _kept(design, config, row, rank, element)
    teacher = row.vision_flops + unit_costs.decoder(design)(unreduced, unreduced, unreduced)
    teacher += (unreduced if everywhere else row.new) * head
    return Cost(
        prefill_flops=prefill,
        decode_flops=decode,
        train_flops=train,
        teacher_flops=teacher,
        kv_bytes=element.itemsize
        * (
            sum(layer.values * kept(cached, layer.window) for layer in first)
            + sum(layer.values * kept(left, layer.window) for layer in later)
        ),
        planning_flops=planning,
        vision_flops=row.vision_flops,
        weight_bytes=element.itemsize * unit_costs.weights(design),
        sequence=prompt,
        full=full,
        state_bytes=unit_costs.state_bytes(design, element),
        activation_bytes=activation,
    )


def _kept(design: Design, config: SkipConfig, row: _Row, rank: int, element: torch.dtype) -> int:
    """Bytes that a training row keeps for its backward: of the decoder, and of the LM head at the answer."""
    counts = [config.counts(size) for size in row.sizes]
    short = sum(one.skipped for one in counts) * config.skip_ffn
    first = sum(one.total for one in counts) + row.text + row.new
    later = first
    if config.drop_after is not None:
        later = sum(one.summaries for one in counts) + row.text + row.new
    decoder = partial(activations.kept, design, rank, config.summary_tokens > 0, element)
    kept = _parts(config, short > 0, decoder)(_square(first, short), _square(later))
    return kept + row.new * activations.logits(design)


class _Sequence(NamedTuple):
    """Tokens of a call of some layers: queries, keys, and those that enter the FFNs."""

    queries: int
    keys: int
    ffn: int


def _square(tokens: int, short: int = 0) -> _Sequence:
    """Return a sequence whose tokens attend to each other; ``short`` of them bypass the FFNs."""
    return _Sequence(tokens, tokens, tokens - short)


def _parts(
    config: SkipConfig, bypass: bool, measure: Callable[..., Flops]
) -> Callable[[_Sequence, _Sequence], int]:
    """Return a function of the sequences in the layers up to ``drop_after``, and after it.

    Args:
        config: decides which layers skip, and which lack tokens.
        bypass: some tokens bypass FFNs.
        measure: ``measure(skipping=…, last=…)`` as of `units.decoder`.
    """
    skipping = None if config.skip_layers == "all" or not bypass else config.skip_layers
    last = config.drop_after
    before = measure(skipping=skipping, last=last)
    after = None if last is None else measure().minus(measure(last=last))
    return lambda first, later: before(*first) + (after(*later) if after is not None else 0)


def _planning(design: Design, config: SkipConfig, row: _Row, new: int, rank: int) -> int:
    """FLOPs of select, merge, summary and probe: matrix products only, no sums and sorts.

    The probe runs over the caller's tokens, including the ``new`` ones of a training row, and with its LoRA.
    """
    if not row.sizes:
        return 0
    criterion, merge, width = config.criterion, config.merging, unit_costs.hidden_size(design)
    flops = 0
    for size in row.sizes:
        counts = config.counts(size)
        flops += criterion.flops(size, counts, width) + merge.flops(size, counts, width)
        flops += 2 * (counts.retained + counts.skipped) * config.summary_tokens * width
    if criterion.probe is not None:
        flops += unit_costs.probing(design, criterion.probe, config.probe_layer, rank)(row.prompt + new)
    if criterion.reads == "tower":
        images = len(row.sizes)
        own = sum(unit_costs.images(design, images, None)[1])
        flops += unit_costs.tower_attention(design, images) * sum(row.sizes) // own
    return flops


def _check_counts(**counts: object) -> None:
    wrong = [f"{name}={count!r}" for name, count in counts.items() if not isinstance(count, int) or count < 0]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: expected a whole number, 0 or more")
