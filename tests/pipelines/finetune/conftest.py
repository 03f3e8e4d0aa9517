"""Settings and rows of tests of one worker's training."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.data.training_rows import read_training_rows
from pipelines.finetune.config import FinetuneConfig
from tests.pipelines.finetune.learners import SKIPPING


@pytest.fixture
def config(tiny_model: Path, shapes_data: Path) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {
            "name": "test",
            "model": {"path": str(tiny_model)},
            "data": {"train": str(shapes_data / "train.json")},
            "lora": {"dropout": 0.2},
            "skip": SKIPPING.model_dump(),
            "training": {"learning_rate": 0.01, "precision": "float32"},
        }
    )


@pytest.fixture
def rows(shapes_data: Path):
    return read_training_rows(str(shapes_data / "train.json")).rows
