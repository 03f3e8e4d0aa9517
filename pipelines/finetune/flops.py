"""FLOPs of a training row, predicted and measured: those of the student and those that its teacher adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import skipvision as sv
from pipelines.data.collate import IGNORED, Batch
from pipelines.finetune.learner import Learner
from pipelines.finetune.objective import summed_loss


class RowTokens(NamedTuple):
    """Tokens of a batch of one row: of its images, of its answers, and all others."""

    visual: int
    answer: int
    text: int

    @classmethod
    def of(cls, model: Any, batch: Batch) -> RowTokens:
        """Count them; ``model`` knows the placeholder of visual tokens."""
        visual = int((batch.inputs["input_ids"] == model.config.image_token_id).sum())
        answer = int((batch.labels != IGNORED).sum())
        return cls(visual, answer, batch.inputs["input_ids"].shape[1] - visual - answer)


def predicted_cost(model: Any, skip: sv.SkipConfig | None, batch: Batch) -> sv.Cost:
    """Return what `predict_cost` predicts for a batch of one row and a PEFT model."""
    tokens = RowTokens.of(model, batch)
    return sv.predict_cost(
        model.config,
        skip,
        images=batch.images,
        text_tokens=tokens.text,
        new_tokens=tokens.answer,
        visual_tokens=tokens.visual // batch.images if batch.images else None,
        lora_rank=next(iter(model.peft_config.values())).r,
        dtype=next(model.parameters()).dtype,
    )


def row_flops(learner: Learner, batch: Batch) -> dict[str, int]:
    """Return the FLOPs of a batch of one row.

    ``student`` is forward and backward; ``teacher`` is the forward that distillation adds. Both are measured
    operation by operation, also where activations are computed again in the backward pass; the other two
    values are predictions. The gradients are cleared.
    """
    model, batch = learner.model, batch.to(learner.device)
    cost = predicted_cost(model, learner.config.skip, batch)

    def student() -> None:
        summed_loss(model, batch)[0].backward()

    with learner.autocast():
        teacher = sv.measure_flops(lambda: learner.objective.teacher_targets(model, batch))
        measured = sv.measure_flops(student)
    learner.optimizer.zero_grad()
    return {
        "student": measured,
        "student_predicted": cost.train_flops,
        "teacher": teacher,
        "teacher_predicted": cost.teacher_flops,
    }
