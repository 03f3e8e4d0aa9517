"""The settings of a fine-tuning run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipelines.data.training_rows import CheckImages, OnBadRow
from pipelines.engines.config import BaseModelSection
from pipelines.shared.paths import InputPath
from pipelines.shared.sections import EngineSection, Section
from pipelines.tracking.config import TrackedConfig, TrainingTrackingConfig
from skipvision.config import SkipConfig

DECODER_LINEARS = (
    r"(.*\.)?(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
"""Matches the linear layers of the text decoder and no layer of a vision tower."""


class DataSection(Section):
    """Training and validation rows: LLaVA JSON, chat JSONL or parquet."""

    train: InputPath = Field(description="file, pattern or fsspec URL of the training rows")
    validation: InputPath | None = Field(
        None, description="validation rows, in the same formats; null = no validation"
    )
    image_root: InputPath | None = Field(
        None, description="folder that relative image paths start at; null = the folder of the file of rows"
    )
    check_images: CheckImages = Field(
        "decode",
        description="how images are checked before training: decode = decode each; exists = only look for "
        "its file; none = no check",
    )
    on_bad_row: OnBadRow = Field(
        "skip",
        description="skip unusable rows, or stop the run; either way they are listed in rejects.jsonl",
    )
    max_length: int = Field(
        4096,
        ge=1,
        description="max tokens of a row, visual tokens included, and never more than the model has "
        "positions; longer rows are rejected, not cut",
    )


class LoraSection(Section):
    """The LoRA adapter: its rank, its scale and the modules it updates."""

    rank: int = Field(16, ge=1, description="rank of the update of each matrix")
    alpha: int = Field(32, ge=1, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the adapter's input")
    target_modules: str = Field(
        DECODER_LINEARS,
        description="regular expression that matches the full names of the adapted modules; default: the "
        "linear layers of the decoder",
    )


class TrainingSection(Section):
    """The objective, the optimiser, precision, memory and checkpoints."""

    objective: Literal["answers", "distill", "both"] = Field(
        "answers",
        description="the targets of an answer's tokens: answers = the words of the row (cross-entropy); "
        "distill = the predictions of the same model without adapter and with all visual tokens (KL "
        "divergence); both = a weighted sum",
    )
    epochs: float = Field(1.0, gt=0, description="passes over all rows; ignored if max_steps is set")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; null = from epochs")
    batch_size: int = Field(16, ge=1, description="rows per optimiser step, over all workers together")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass of a worker; gradients accumulate; null = its whole share",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak AdamW learning rate")
    warmup: float = Field(
        0.03, ge=0, le=1, description="share of the steps during which the learning rate rises"
    )
    final_learning_rate: float = Field(
        0.0, ge=0, le=1, description="learning rate at the end of the cosine, as a share of learning_rate"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="max norm of the gradients, which are clipped to it")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of matrix products; auto = bfloat16 if the hardware supports it"
    )
    gradient_checkpointing: bool = Field(
        False, description="save memory by computing activations again in the backward pass"
    )
    prefetch: int = Field(2, ge=0, description="steps whose images are loaded in advance")
    log_every: int = Field(10, ge=1, description="steps between progress lines")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="number of newest checkpoints to keep")

    @property
    def teaches(self) -> bool:
        """Whether the full-token model takes part as a teacher."""
        return self.objective != "answers"


class DistillationSection(Section):
    """How the full-token model teaches, with training.objective distill or both."""

    temperature: float = Field(
        1.0,
        gt=0,
        description="divides the logits of teacher and student; above 1, unlikely tokens weigh more. The "
        "divergence is multiplied by its square",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="tokens that are compared one by one at each position, the teacher's most likely ones; "
        "all others are compared as one; null = the whole vocabulary",
    )
    cache: bool = Field(
        False,
        description="keep the teacher's top_k predictions of each row on disk, so that epochs after the "
        "first need no forward of the teacher; the job states their bytes before it trains",
    )
    answers_weight: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the cross-entropy in the loss of objective both; the divergence has the rest",
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps in which the student samples each row's last answer itself, and "
        "learns only the teacher's predictions for it",
    )

    @model_validator(mode="after")
    def _cache_is_small(self) -> Self:
        if self.cache and self.top_k is None:
            raise ValueError(
                "distillation.cache needs distillation.top_k: all predictions of a vocabulary would take "
                "megabytes per row; set top_k, for example to 32"
            )
        return self


class AnsweringSection(Section):
    """How the full-token model answers rows without an answer, before a training with a teacher."""

    max_new_tokens: int = Field(
        128, ge=1, description="max tokens of an answer; a row whose answer is longer is rejected"
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="0 always chooses the likeliest token; above 0, tokens are drawn by seed",
    )
    engine: EngineSection = EngineSection()


class EvaluationSection(Section):
    """Validation during and after training."""

    every: int = Field(0, ge=0, description="steps between validations; 0 = only after the last step")
    loss_rows: int = Field(256, ge=0, description="max rows for the validation loss")
    answer_rows: int = Field(
        240, ge=0, description="max rows answered for exact match, in equal shares per task; 0 = none"
    )
    batch_size: int = Field(32, ge=1, description="rows per forward pass of a worker")
    max_new_tokens: int = Field(128, ge=1, description="max tokens of an answer")


class ScalingSection(Section):
    """Ray workers. A resumed run may change these settings, which affect only rounding and speed."""

    workers: int = Field(1, ge=1, description="worker processes, which share every batch")
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPUs and torch threads of each worker; null = all CPUs, divided evenly"
    )
    gpus_per_worker: int | None = Field(
        None, ge=0, le=1, description="GPUs of each worker; null = one if the cluster has any, else none"
    )
    autoscaling: bool = Field(
        False,
        description="the cluster grows on demand: request workers that it cannot hold yet; each gets one CPU "
        "and no GPU unless the settings above say otherwise",
    )
    max_failures: int = Field(
        2, ge=-1, description="max worker crashes that the run survives by resuming; -1 = any number"
    )


class FinetuneConfig(TrackedConfig):
    """A fine-tuning run. An existing run of the same name is resumed; other settings are refused."""

    resume_with_changes: bool = Field(
        False,
        description="resume an unfinished run even if learning_rate, warmup, final_learning_rate, "
        "weight_decay, max_grad_norm or precision of training have changed; MLflow records the changes",
    )
    seed: int = Field(
        0, ge=0, description="seed of the adapter's initial weights, of dropout and of the order of rows"
    )
    model: BaseModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    skip: SkipConfig | None = Field(
        SkipConfig(retained=0.25, skipped=0.25),
        description="how visual tokens are skipped, in training and later in use; null = no skipping",
    )
    training: TrainingSection = TrainingSection()
    distillation: DistillationSection = DistillationSection()
    answering: AnsweringSection = AnsweringSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrainingTrackingConfig = TrainingTrackingConfig()
    scaling: ScalingSection = ScalingSection()

    @property
    def distillation_cached(self) -> bool:
        """Whether the teacher's predictions are kept on disk."""
        return self.training.teaches and self.distillation.cache

    @model_validator(mode="after")
    def _somebody_teaches(self) -> Self:
        if self.distillation.on_policy and not self.training.teaches:
            raise ValueError(
                f"distillation.on_policy = {self.distillation.on_policy} with training.objective = answers: "
                "the student's own answers teach nothing without a teacher; set training.objective to "
                "distill or both"
            )
        return self

    @model_validator(mode="after")
    def _teacher_differs(self) -> Self:
        if self.training.objective == "distill" and (self.skip is None or self.skip.is_full):
            given = "null" if self.skip is None else "every visual token retained"
            raise ValueError(
                f"training.objective = distill with skip = {given}: the student would be its own teacher "
                "from the first step on, and nothing would be learnt; set skip, or objective answers or both"
            )
        return self
