"""A tiny random model of any image-text-to-text family of transformers, and inputs for it::

model = tiny_model("qwen2_5_vl")
batch = tiny_batch(model, [[3, "image", 4], [5], ["image", 2, "small image", 3]])
model(**batch)
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from skipvision._compat import encoder_defaults, model_output, modules_kept_in_float32
from skipvision.anatomy.pictures import ONE_A_ROW, SCALES, Request, SyntheticImage, collate, recipe_of
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.loading import build_model
from skipvision.testing.configs import BOS, EOS, FIRST_MARK, FIRST_SPECIAL, FIRST_WORD, PAD, tiny_config
from skipvision.testing.prompts import ONE_TOKEN_TYPE, TOKEN_TYPES, frame_of

_CROSS_ATTENTION = "its decoder reads images by cross-attention, not as tokens of its own"
_COUNTED_POSITIONS = (
    "its `prepare_inputs_for_generation` drops position ids, and its text model counts positions by the "
    "entries of the cache, which pruning changes"
)

UNSUPPORTED = {
    "blip": _CROSS_ATTENTION,
    "diffusion_gemma": "it refines a canvas of words instead of generating them in order",
    "evolla": "it reads proteins, not images",
    "florence2": _CROSS_ATTENTION,
    "git": "its layers normalise after the FFN, and its images come before the prompt, without placeholders",
    "idefics": _CROSS_ATTENTION,
    "instructblipvideo": "it reads videos, not images",
    "kosmos-2": _COUNTED_POSITIONS,
    "kosmos-2.5": _COUNTED_POSITIONS,
    "mistral4": "it reads text only",
    "mllama": _CROSS_ATTENTION,
    "pi0": "it generates actions, not words",
    "pix2struct": _CROSS_ATTENTION,
    "pp_formulanet": _CROSS_ATTENTION,
    "t5gemma2": _CROSS_ATTENTION,
    "udop": _CROSS_ATTENTION,
    "vision-encoder-decoder": _CROSS_ATTENTION,
}
"""Families whose decoders have no visual tokens, and the reason."""

WITH_TIMM = ("fast_vlm", "perception_lm")
"""Families that are supported where timm is installed, which has their vision towers."""

FAMILIES = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - UNSUPPORTED.keys()))
"""All other image-text-to-text families of the installed transformers, by model_type."""

Row = Sequence[int | str]


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Build a model of a family with random weights, in eval mode: 3 decoder layers, under a million weights.

    Args:
        model_type: one of `FAMILIES`.
        dtype: dtype of all weights, except those that the family always keeps in float32.
        attention: attention implementation; None = "sdpa" if the family supports it, else "eager".
        seed: seed of the weights.

    Raises:
        UnsupportedModelError: the family does not exist, is `UNSUPPORTED`, needs a package that is not
            installed, or does not support this attention.
    """
    if model_type not in FAMILIES:
        reason = UNSUPPORTED.get(model_type, "transformers has no such image-text-to-text family")
        raise UnsupportedModelError(
            f"no tiny {model_type!r}: {reason}; choose from {', '.join(FAMILIES)}", reason
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = build_model(
                tiny_config(model_type),
                attn_implementation=attention,
                # torch has no grouped matrix product in float64.
                experts_implementation="eager" if dtype == torch.float64 else None,
            )
        except (ImportError, ValueError) as error:
            raise UnsupportedModelError(
                f"a tiny {model_type!r} with attention={attention!r} cannot be built here: {error}",
                _build_failure(model_type, error),
            ) from error
        # With Hugging Face's small initial weights FFN updates are negligible and no test could see them.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1]
                parameter.data.normal_(0, 0.6 / math.sqrt(fan_in))
    # Random weights would sometimes generate "<image>".
    model.generation_config.suppress_tokens = list(range(FIRST_SPECIAL, FIRST_WORD))
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    # `model.to` would drop the imaginary part of complex buffers.
    exact = modules_kept_in_float32(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in exact):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


def tiny_batch(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    padding: str = "left",
    seed: int = 0,
    row_numbers: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Build inputs for a `tiny_model`, as its family's processor would.

    ``[[3, "image", 4], [5], ["image", 2, "small image", 3]]`` is a row of three words, an image and four
    words; a row of five words; and a row with two images. ``"small image"`` and ``"large image"`` have
    fewer and more visual tokens where the family has images of several sizes.

    Args:
        model: decides the number of visual tokens of each image, and the device and dtype of pixels.
        rows: for each row, numbers of words and names of images.
        padding: side on which shorter rows are padded, "left" or "right".
        seed: seed of words and pixels.
        row_numbers: numbers that replace the rows' indices in seeding: ``tiny_batch(model, [rows[i]],
            row_numbers=[i])`` is row i of ``tiny_batch(model, rows)`` without padding.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, T), pixels, and the family's other inputs.

    Raises:
        InputError: a part of a row or the padding side is unknown; or a row has no image or several, but
            the family takes exactly one.
    """
    if padding not in ("left", "right"):
        raise InputError(f"padding={padding!r}: expected 'left' or 'right'")
    config = model.config
    numbers = range(len(rows)) if row_numbers is None else row_numbers
    seeds = [(seed, number) for number in numbers]
    images = [_images(model, row, seeds) for row, seeds in zip(rows, seeds, strict=True)]
    lines = [
        torch.tensor(_line(model, row, shown, _random(*seeds)))
        for row, shown, seeds in zip(rows, images, seeds, strict=True)
    ]
    batch = {
        "input_ids": pad_sequence(lines, True, PAD, padding),
        "attention_mask": pad_sequence([torch.ones_like(line) for line in lines], True, 0, padding),
    }
    for name, fields in TOKEN_TYPES.items():
        if name in _arguments(model.forward):
            named = torch.tensor([getattr(config, field) for field in fields])
            distinguishes_images = config.model_type not in ONE_TOKEN_TYPE
            batch[name] = torch.isin(batch["input_ids"], named).long() * distinguishes_images
    batch |= collate(config.model_type, images)
    return {name: value.to(model.device) for name, value in batch.items()}


def _build_failure(model_type: str, error: Exception) -> str:
    package = re.search(r"requires the (\S+) library", str(error))
    if package and model_type in WITH_TIMM:
        return "supported where timm is installed, which has its vision tower"
    if package:
        return f"not tried here: needs {package[1]}"
    return f"not built here: {str(error).strip().partition(' but ')[0]}"


def _arguments(function: Any) -> Container[str]:
    return inspect.signature(function).parameters


def _random(*numbers: int) -> torch.Generator:
    """Return a generator seeded by a sequence of numbers."""
    return torch.Generator().manual_seed(sum(number * 1009**power for power, number in enumerate(numbers)))


def _images(model: PreTrainedModel, row: Row, seeds: tuple[int, int]) -> list[SyntheticImage]:
    """Build the images of one row."""
    family = model.config.model_type
    scales = [_scale(part) for part in row if isinstance(part, str)]
    if family in ONE_A_ROW and len(scales) != 1:
        raise InputError(f"row {list(row)} has {len(scales)} images: {family} takes exactly one in each row")
    recipe = recipe_of(family, _arguments(model.base_model.get_image_features))
    return [
        recipe(Request(model.config, scale, len(scales), _random(*seeds, number), model.dtype))
        for number, scale in enumerate(scales, start=1)
    ]


def _scale(part: str) -> int:
    if part not in SCALES:
        raise InputError(f"a row has {part!r}: expected a number of words, or one of {', '.join(SCALES)}")
    return SCALES[part]


def _line(
    model: PreTrainedModel, row: Row, images: Sequence[SyntheticImage], words: torch.Generator
) -> list[int]:
    """Return the token ids of one row."""
    line: list[int] = []
    following = iter(images)
    for part in row:
        if isinstance(part, str):
            line += _framed(model, next(following))
        else:
            vocabulary = model.config.get_text_config().vocab_size
            line += torch.randint(FIRST_WORD, vocabulary, (part,), generator=words).tolist()
    return line


def _framed(model: PreTrainedModel, image: SyntheticImage) -> list[int]:
    """Return an image's placeholders with the marks around them."""
    frame = frame_of(model.config)
    marks = {name: FIRST_MARK + index for index, name in enumerate(frame.names)}

    def ids(names: Sequence[str]) -> list[int]:
        return [_field(model.config, name, marks[name]) for name in names]

    segment = ids(frame.lead) + [model.config.image_token_id] * (_tokens(model, image) // image.segments)
    return (
        ids(frame.before) + segment + (ids(frame.between) + segment) * (image.segments - 1) + ids(frame.after)
    )


@torch.no_grad()
def _tokens(model: PreTrainedModel, image: SyntheticImage) -> int:
    """Count the visual tokens of an image: the features that the model computes for it."""
    vision = collate(model.config.model_type, [[image]])
    on_device = {name: value.to(model.device) for name, value in vision.items()}
    base: Any = model.base_model
    encoder = base.get_image_features
    output = encoder(**encoder_defaults(base, encoder), **on_device, return_dict=True)
    features = model_output(output, "pooler_output")
    if features is None and "deepstack_features" in output:
        features = output.deepstack_features[0][1]
    elif features is None:
        features = output.last_hidden_state
    return sum(feature.shape[:-1].numel() for feature in features)


def _field(config: Any, name: str, default: int) -> int:
    name, _, index = name.partition(".")
    value: Any = getattr(config, name, default)
    return int(value[int(index)] if index else value)
