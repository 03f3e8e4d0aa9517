"""Everything a fine-tuning run can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.data.training_rows import CheckImages, OnBadRow
from pipelines.engines.config import BaseModelSection
from pipelines.shared.paths import InputPath
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackedConfig, TrainingTrackingConfig
from skipvision.config import SkipConfig

DECODER_LINEARS = (
    r"(.*\.)?(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
"""Matches the linear layers of the text decoder, and no layer of a vision tower."""


class DataSection(Section):
    """Training and validation rows: LLaVA JSON, chat JSONL or parquet."""

    train: InputPath = Field(description="file, pattern or fsspec URL of the training rows")
    validation: InputPath | None = Field(None, description="the same for evaluation; null = none is done")
    image_root: InputPath | None = Field(
        None, description="folder that relative image paths start at; null = the folder of the rows' file"
    )
    check_images: CheckImages = Field(
        "decode", description="before training, decode every image, see that it exists, or trust the data set"
    )
    on_bad_row: OnBadRow = Field(
        "skip",
        description="go on without rows that cannot be used, or stop; both list them in a rejects file",
    )
    max_length: int = Field(
        4096, ge=1, description="tokens of a row, visual ones included, above which it is rejected, never cut"
    )


class LoraSection(Section):
    """The low-rank adapter."""

    rank: int = Field(16, ge=1, description="rank of the update of each matrix")
    alpha: int = Field(32, ge=1, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the adapter's input")
    target_modules: str = Field(
        DECODER_LINEARS,
        description="regular expression that the full names of adapted modules match; default: the decoder's "
        "linear layers",
    )


class TrainingSection(Section):
    """Optimisation."""

    epochs: float = Field(1.0, gt=0, description="times every row is shown; not used if max_steps is given")
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; null = as epochs says")
    batch_size: int = Field(16, ge=1, description="rows per optimiser step, over all workers together")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="rows per forward pass of a worker, gradients accumulate; null = its whole share",
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak AdamW learning rate")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    final_learning_rate: float = Field(
        0.0, ge=0, le=1, description="where the cosine ends, as a share of learning_rate"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="norm that gradients are clipped to")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of matrix products; auto = bfloat16 where the hardware has it"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep less for the backward pass and compute it twice"
    )
    prefetch: int = Field(2, ge=0, description="steps whose images are opened in advance")
    log_every: int = Field(10, ge=1, description="steps between progress lines")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")


class EvaluationSection(Section):
    """What is done with the validation rows."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0 = only after the last step")
    loss_rows: int = Field(256, ge=0, description="rows the validation loss is taken over, at most")
    answer_rows: int = Field(
        240, ge=0, description="rows answered for exact match, at most, tasks in equal shares; 0 = none"
    )
    batch_size: int = Field(32, ge=1, description="rows per forward pass of a worker")
    max_new_tokens: int = Field(128, ge=1, description="tokens of an answer, at most")


class ScalingSection(Section):
    """Workers. These settings may differ when a run is resumed: they change only rounding and speed."""

    workers: int = Field(1, ge=1, description="processes that share every batch")
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPUs, and torch threads, of each; null = all there are, shared out evenly"
    )
    gpus_per_worker: int | None = Field(
        None, ge=0, le=1, description="GPUs of each; null = one if the cluster has any, else none"
    )
    autoscaling: bool = Field(
        False,
        description="the cluster grows on demand: ask for workers that it cannot hold yet; null counts above "
        "then mean one CPU and no GPU",
    )
    max_failures: int = Field(
        2, ge=-1, description="worker crashes after which to resume from the last checkpoint; -1 = any number"
    )


class FinetuneConfig(TrackedConfig):
    """A fine-tuning run; one that is there already under its name is resumed, or refused if it differs."""

    resume_with_changes: bool = Field(
        False,
        description="go on with an unfinished run although learning_rate, warmup, final_learning_rate, "
        "weight_decay, max_grad_norm or precision of training are others now; MLflow is told",
    )
    seed: int = Field(
        0, ge=0, description="seed of the adapter's initial weights, of dropout and of the order"
    )
    model: BaseModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    skip: SkipConfig | None = Field(
        SkipConfig(retained=0.25, skipped=0.25),
        description="how visual tokens are skipped, now and later in use; null = all take the full path",
    )
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrainingTrackingConfig = TrainingTrackingConfig()
    scaling: ScalingSection = ScalingSection()
