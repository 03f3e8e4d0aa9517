"""Answer lmms-eval's questions with the engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import skipvision as sv
from skipvision.errors import ConfigError, InputError
from skipvision.loading import load_model, load_processor

_PLACEHOLDER = "<image>"
_MAX_NEW_TOKENS = 1024
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_WITHOUT_EFFECT = ("do_sample", "image_aspect_ratio")
"""Accepted and ignored: the temperature decides on sampling, and the processor on image sizes."""


@dataclass(frozen=True)
class Question:
    """A context in which ``<image>`` may mark the images, the images, and ``generation_kwargs``."""

    context: str
    images: Sequence[Image.Image]
    generation: Mapping[str, Any]


def load_engine(
    pretrained: str,
    adapter: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    max_sequences: int = 16,
    kv_budget_bytes: int = 2**30,
    **skip: Any,
) -> sv.Engine:
    """Load a model, and an adapter if one is given, into an engine.

    Args:
        pretrained: folder or Hugging Face id of the model.
        adapter: folder of an adapter from `save_adapter`.
        device: torch's name of it; auto = a GPU if one is available.
        dtype: torch's name of it; auto = the dtype of the checkpoint.
        attention: attention implementation of transformers.
        max_sequences: max answers that are generated at once.
        kv_budget_bytes: size of the KV cache.
        skip: fields of `SkipConfig`, or ``skip="full"``. Without any, the model runs as the adapter was
            trained, or with full tokens if it has no adapter.

    Raises:
        ConfigError: a field is unknown, its value is invalid, or the model cannot be loaded.
        AdapterError: the folder has no adapter for this model.
        UnsupportedModelError: Skip-Vision cannot be attached to the model.
    """
    full = skip.pop("skip", None)
    if full not in (None, "full") or (full and skip):
        raise ConfigError(
            f"skip={full!r}: pass either skip=full, or fields of SkipConfig such as retained=100,skipped=156"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = load_model(pretrained, dtype=dtype, attn_implementation=attention)
    base = base.to(device)
    model = base if adapter is None else sv.load_adapter(base, Path(adapter)).to(device, base.dtype)
    config = sv.SkipConfig(**skip) if skip else sv.SkipConfig.full() if full or adapter is None else None
    processor = load_processor(pretrained)
    return sv.Engine(model, processor, config, max_sequences=max_sequences, kv_budget_bytes=kv_budget_bytes)


def answer(engine: sv.Engine, questions: Iterable[Question]) -> dict[int, sv.Completion]:
    """Return the completions by index of their question; one that failed has an ``error``.

    Raises:
        ConfigError: a question's ``generation_kwargs`` are not supported.
    """
    requests = (request(number, question) for number, question in enumerate(questions))
    return {completion.key: completion for completion in engine.run(requests)}


def request(number: int, question: Question) -> sv.Request:
    """Return a request of one user message. Images stand where the context marks them, or else come first."""
    return sv.Request(
        [{"role": "user", "content": _content(question)}],
        list(question.images),
        sampling=_sampling(question.generation),
        key=number,
    )


def _content(question: Question) -> list[dict[str, str]]:
    pieces = question.context.split(_PLACEHOLDER)
    if len(pieces) - 1 != len(question.images):
        if len(pieces) > 1:
            raise InputError(
                f"the context has {len(pieces) - 1} {_PLACEHOLDER}, the task {len(question.images)} images: "
                "mark each image once, or none"
            )
        pieces = [""] * len(question.images) + pieces
    content: list[dict[str, str]] = []
    for position, piece in enumerate(pieces):
        if position:
            content.append({"type": "image"})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def _sampling(generation: Mapping[str, Any]) -> sv.Sampling:
    """Translate ``generation_kwargs`` of a task; null there means the default."""
    given = {name: value for name, value in generation.items() if value is not None}
    if given.pop("num_beams", 1) != 1:
        raise ConfigError(f"generation_kwargs: num_beams={generation['num_beams']!r} is not supported: use 1")
    unknown = sorted(given.keys() - {"until", *_SAMPLING, *_WITHOUT_EFFECT})
    if unknown:
        known = ", ".join(("until", *_SAMPLING))
        raise ConfigError(f"generation_kwargs: {unknown[0]} is not supported: choose from {known}")
    until = given.get("until", ())
    values = {name: given[name] for name in _SAMPLING if name in given}
    if not values.get("top_p", 1):  # tasks use 0 to disable it
        values["top_p"] = 1
    return sv.Sampling(
        **{"max_new_tokens": _MAX_NEW_TOKENS, **values},
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )
