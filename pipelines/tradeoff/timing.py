"""Times of one request by part: vision tower, selection, prefill of the decoder, and decoding.

The parts are read off forward hooks: the tower and its projector run first, then the plan is made, then the
decoder's layers run. A probe that runs some layers to make the plan counts as selection.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pipelines.evaluation.answering import seconds_of
from skipvision.anatomy.families import dissect
from skipvision.engine import Engine, Request, Sampling

_ENCODERS = ("vision_tower", "vision_model", "visual", "multi_modal_projector")
"""Names of the modules that encode images; in some families the projector is part of the tower."""

DECODED = 8
"""Tokens that are decoded after the first one to measure the time per token."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one request.

    Attributes:
        first_token: from its submission to its first token.
        tower: in the vision tower and its projector.
        selection: from then to the decoder's first layer: insert the visual tokens, make the plan, reduce.
        prefill: in the decoder's layers.
        decode: for each further token.
    """

    first_token: float
    tower: float
    selection: float
    prefill: float
    decode: float

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """Tower, selection, prefill and decode."""
        return astuple(self)[1:]


class Stopwatch:
    """Reads the time when parts of a model begin and end."""

    def __init__(self, model: nn.Module) -> None:
        anatomy = dissect(model)
        encoders = [getattr(anatomy.outer, name, None) for name in _ENCODERS]
        self._encoders = [module for module in encoders if isinstance(module, nn.Module)]
        self._layers = [layer.whole for layer in anatomy.layers]
        self._clear()

    def _clear(self) -> None:
        self._encoding = self._encoded = self._began = self._ended = 0.0

    def measure(self, engine: Engine, request: Request) -> Seconds:
        """Answer a prepared request twice in an idle engine: its first token, and `DECODED` more.

        Raises:
            SkipVisionError: the engine cannot complete the request.
        """
        self._clear()
        with self._hooks():
            # Synchronising a GPU at each mark takes a little longer than the request alone.
            first = seconds_of(engine, replace(request, sampling=Sampling(max_new_tokens=1)))
        several = Sampling(max_new_tokens=1 + DECODED)
        longer = replace(request, sampling=several, adjust=lambda: partial(_never_end, engine.ending))
        [completion] = engine.run([longer])
        if completion.error is not None:
            raise completion.error
        timing = completion.timing
        return Seconds(
            first,
            self._encoding,
            self._began - self._encoded,
            self._ended - self._began,
            (timing.total - (timing.first_token or 0.0)) / DECODED,
        )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [self._layers[0].register_forward_pre_hook(self._begin)]
        handles.append(self._layers[-1].register_forward_hook(self._end))
        for encoder in self._encoders:
            handles.append(encoder.register_forward_pre_hook(self._begin_encoding))
            handles.append(encoder.register_forward_hook(self._end_encoding))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin_encoding(self, *_: Any) -> None:
        self._encoding -= _now()

    def _end_encoding(self, *_: Any) -> None:
        self._encoded = _now()
        self._encoding += self._encoded

    def _begin(self, *_: Any) -> None:
        self._began = _now()  # a later call replaces that of a probe

    def _end(self, *_: Any) -> None:
        self._ended = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _never_end(ending: frozenset[int], ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Make the tokens that end an answer impossible, so that all answers have the same length."""
    return logits.index_fill(0, torch.tensor(sorted(ending), device=logits.device), -torch.inf)
