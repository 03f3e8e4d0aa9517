"""Settings of the base model's training."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class BaseModelConfig(BaseModel):
    """Sizes, schedules and seeds of the base model's training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path = Field(Path("models/shapes-llava"), description="folder of the finished model")
    work_dir: Path = Field(Path("runs/base"), description="folder for checkpoints and the training log")
    seed: int = Field(0, description="seed of the weights, the scenes and the questions")
    vision_images: int = Field(51_200, description="stage 1: images seen")
    vision_batch: int = Field(32, description="stage 1: images per step")
    vision_learning_rate: float = Field(1.5e-3, description="stage 1: peak AdamW learning rate")
    language_images: int = Field(48_000, description="stage 2: images seen, each with `questions` questions")
    language_batch: int = Field(16, description="stage 2: images per step")
    language_learning_rate: float = Field(
        1.2e-3, description="stage 2: peak AdamW learning rate of the decoder"
    )
    tower_learning_rate: float = Field(
        6e-4, description="stage 2: peak AdamW learning rate of the vision tower"
    )
    patch_loss_weight: float = Field(0.3, description="stage 2: weight of stage 1's loss, which continues")
    questions: int = Field(
        12, description="stage 2: independent questions per image, one of them the caption"
    )
    warmup: float = Field(0.03, description="share of a stage's steps in which the learning rate rises")
    easy_share: float = Field(0.1, description="stage 2: share of the steps that show at most two objects")
    digit_weight: float = Field(6.0, description="stage 2: loss weight of digits from `digits_from` on")
    digits_from: int = Field(1080, description="stage 2: step from which `digit_weight` applies")
    weight_decay: float = Field(0.02, description="AdamW weight decay of matrices")
    workers: int = Field(1, description="processes that draw scenes")
    threads: int = Field(0, description="torch threads; 0 = torch's own choice")
    checkpoint_minutes: float = Field(5.0, description="minutes between checkpoints")
    test_scenes: int = Field(
        300, description="test scenes for the accuracies in the model card, one question per task each"
    )
