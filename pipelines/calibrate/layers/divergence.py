"""The measurement of a worker: the divergence of predictions under a SkipConfig from full tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import skipvision as sv
from pipelines.data.chat import ChatFormat, encode
from pipelines.data.collate import Batch, Collator, open_images
from pipelines.data.rows import Message, TrainingRow
from pipelines.engines.loading import load_processor, usable_device
from pipelines.engines.model import EngineModel, load_tuned
from pipelines.evaluation.exact_match import evaluation_mode, greedy_texts
from pipelines.finetune.objective import answer_logits, next_tokens
from skipvision.config import SkipConfig

_TOP_K = 64
"""Tokens that are compared one by one; all others are compared as one."""


class Distance(NamedTuple):
    """The distance of a row's predictions from those with full tokens.

    Attributes:
        divergence: KL(full ‖ skipping) in nats, mean over the tokens of the answer.
        agreement: share of these tokens at which both predict the same next token.
    """

    divergence: float
    agreement: float


@dataclass(frozen=True)
class LayerTask:
    """A unit of work for one process.

    Attributes:
        rows: without ``skip``, prompts; otherwise prompts with the answers of the model with full tokens.
        skip: the config to measure; None = answer the prompts with full tokens.
    """

    rows: tuple[TrainingRow, ...]
    skip: SkipConfig | None


class Measurer:
    """The model of one process, and its predictions with full tokens."""

    def __init__(self, model: EngineModel, batch_size: int, max_new_tokens: int) -> None:
        self._model: Any = load_tuned(model, usable_device())
        self._attachment = sv.attachment_of(self._model) or sv.attach(self._model, model.skip)
        self._processor = load_processor(model.base)
        self._collate = Collator(self._processor)
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self._full: dict[tuple[str, ...], tuple[sv.SoftTargets, torch.Tensor]] = {}

    def do(self, number: int, task: LayerTask) -> tuple[int, list[Any]]:
        """Return ``number`` with a text or a `Distance` for each row."""
        found: list[Any] = []
        with evaluation_mode(self._model):
            for start in range(0, len(task.rows), self._batch_size):
                rows = task.rows[start : start + self._batch_size]
                found += self._answers(rows) if task.skip is None else self._distances(rows, task.skip)
        return number, found

    def _answers(self, rows: Sequence[TrainingRow]) -> list[str]:
        chat = ChatFormat(self._processor)
        rows, images = open_images(rows, None)
        prompts = [chat.prompt(row.messages) for row in rows]
        inputs = encode(self._processor, prompts, images, padding_side="left")
        with self._attachment.using(SkipConfig.full()):
            texts = greedy_texts(self._model, chat.tokenizer, inputs, self._max_new_tokens)
        return [chat.special.unescape(text).strip() for text in texts]

    def _distances(self, rows: Sequence[TrainingRow], skip: SkipConfig) -> list[Distance]:
        batch = self._collate(rows).to(self._model.device)
        _, at = next_tokens(batch)
        targets, likeliest = self._targets(batch, at)
        logits = self._logits(batch, at, skip)
        same = (logits.argmax(dim=-1) == likeliest).float()
        sizes = at.sum(dim=1).tolist()
        pairs = zip(targets.divergence(logits).split(sizes), same.split(sizes), strict=True)
        return [Distance(far.mean().item(), near.mean().item()) for far, near in pairs]

    def _targets(self, batch: Batch, at: torch.Tensor) -> tuple[sv.SoftTargets, torch.Tensor]:
        """Return the predictions with full tokens at the positions of answers, computed once per batch."""
        if batch.keys not in self._full:
            logits = self._logits(batch, at, SkipConfig.full())
            top_k = min(_TOP_K, logits.shape[-1])
            self._full[batch.keys] = (sv.SoftTargets.of(logits, top_k=top_k), logits.argmax(dim=-1))
        return self._full[batch.keys]

    def _logits(self, batch: Batch, at: torch.Tensor, skip: SkipConfig) -> torch.Tensor:
        with self._attachment.using(skip):
            return answer_logits(self._model, batch, at)


def with_answers(rows: Sequence[TrainingRow], texts: Sequence[str]) -> tuple[TrainingRow, ...]:
    """Append the answers to their rows; a row with an empty answer has nothing to compare and is left out."""
    pairs = zip(rows, texts, strict=True)
    return tuple(
        replace(row, messages=(*row.messages, Message("assistant", text))) for row, text in pairs if text
    )
