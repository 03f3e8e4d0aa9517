"""The objective of the training: the words of the rows, the teacher's predictions, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

import skipvision as sv
from pipelines._compat import logits_at
from pipelines.data.collate import IGNORED, Batch
from pipelines.finetune.config import DistillationSection, TrainingSection
from pipelines.finetune.teacher_cache import TeacherCache


class Loss(NamedTuple):
    """Losses of a batch, summed over its learnt tokens.

    Attributes:
        total: to be minimised; the only one with gradients.
        learnt: number of learnt tokens.
        answers: cross-entropy of the rows' own words.
        distill: divergence from the teacher; None without a teacher.
    """

    total: torch.Tensor
    learnt: int
    answers: torch.Tensor
    distill: torch.Tensor | None = None

    def values(self) -> list[float]:
        """Return the fields as numbers; 0 without a teacher."""
        distill = 0.0 if self.distill is None else self.distill.item()
        return [self.total.item(), self.learnt, self.answers.item(), distill]


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch.

    Attributes:
        training: names the objective.
        distillation: how the teacher teaches.
    """

    training: TrainingSection
    distillation: DistillationSection

    def loss(
        self, model: nn.Module, batch: Batch, cache: TeacherCache | None = None, *, own_answers: bool = False
    ) -> Loss:
        """Return the loss of the learnt tokens of a batch, which is on the model's device.

        The teacher runs only if a row of the batch is not in ``cache``. With ``own_answers`` the model wrote
        the answers itself: only the divergence is minimised, and nothing is cached.
        """
        if not self.training.teaches:
            total, learnt = summed_loss(model, batch)
            return Loss(total, learnt, total.detach())
        words, learnt_at = next_tokens(batch)
        cache = None if own_answers else cache
        teacher = None if cache is None else cache.get(batch.keys, self.distillation.temperature)
        if teacher is None:
            teacher = self.teacher_targets(model, batch)  # before the student: see `as_teacher`
            if cache is not None:
                cache.add(batch.keys, learnt_at.sum(dim=1).tolist(), teacher)
        logits = answer_logits(model, batch, learnt_at)
        distill = teacher.to(logits.device).divergence(logits).sum()
        both = self.training.objective == "both" and not own_answers
        own = logits if both else logits.detach()
        answers = F.cross_entropy(own.float(), words[learnt_at], reduction="sum")
        weight = self.distillation.answers_weight if both else 0.0
        total = weight * answers + (1 - weight) * distill
        return Loss(total, int(learnt_at.sum()), answers.detach(), distill.detach())

    def teacher_targets(self, model: nn.Module, batch: Batch) -> sv.SoftTargets:
        """Return the predictions of the base model with all visual tokens, for the learnt tokens."""
        _, learnt_at = next_tokens(batch)
        with sv.as_teacher(model):
            logits = logits_at(model, learnt_at, **batch.inputs, use_cache=False)
        settings = self.distillation
        return sv.SoftTargets.of(logits, temperature=settings.temperature, top_k=settings.top_k)


def summed_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy of a batch's learnt tokens, and their number."""
    words, learnt_at = next_tokens(batch)
    logits = answer_logits(model, batch, learnt_at)
    return F.cross_entropy(logits.float(), words[learnt_at], reduction="sum"), int(learnt_at.sum())


def next_tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) the token that each position predicts, and where it is learnt: position t predicts t + 1."""
    words = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    return words, words != IGNORED


def answer_logits(model: nn.Module, batch: Batch, learnt_at: torch.Tensor) -> torch.Tensor:
    """(n, V) logits at the learnt positions; the LM head runs nowhere else.

    With Skip-Vision attached, answers attend only to tokens that are in the KV cache during decoding.
    Otherwise they would learn to attend to skipped tokens, which decoding does not have.
    """
    given: dict[str, Any] = {}
    if sv.attachment_of(model) is not None:
        given[sv.DECODED_KEYWORD] = _decoded(batch, cast(Any, model).config.image_token_id)
    return logits_at(model, learnt_at, **batch.inputs, **given, use_cache=False)


def _decoded(batch: Batch, image_token_id: int) -> torch.Tensor:
    """(B, T) True from each row's first learnt token on, but not before the end of its last image."""
    visual = batch.inputs["input_ids"] == image_token_id
    follows_images = visual.flip(1).cumsum(dim=1).flip(1) == 0
    return ((batch.labels != IGNORED).cumsum(dim=1) > 0) & follows_images
