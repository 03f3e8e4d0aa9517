"""Fine-tuning and captioning work with model, data and storage in folders with odd names.

The quick tests of both jobs use such folders, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sqlalchemy.engine import make_url

from pipelines.caption.config import CaptionConfig
from pipelines.caption.job import run_caption
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.job import run_finetune
from pipelines.tracking.client import sqlite_file
from pipelines.tracking.config import TrackingConfig
from tests.pipelines.odd_folders import CLOUD_DRIVE, HOSTILE

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.timeout(600),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [CLOUD_DRIVE, HOSTILE])
def test_a_fine_tune_and_its_captions(
    name: str, tiny_model: Path, shapes_data: Path, tmp_path: Path, local_ray: None
) -> None:
    folder = tmp_path / name
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(shapes_data / "images", folder / "images")
    rows = json.loads((shapes_data / "train.json").read_text())[:8]
    (folder / "train.json").write_text(json.dumps(rows))
    shared: dict[str, Any] = {
        "storage": str(folder / "runs"),
        "tracking": {"experiment": "tests"},
        "scaling": {"cpus_per_worker": 1},
    }
    training = {"max_steps": 2, "batch_size": 4, "precision": "float32", "checkpoint_every": 1}
    tuned = run_finetune(
        FinetuneConfig.model_validate(
            {
                **shared,
                "name": "tuned",
                "model": {"path": str(folder / "model")},
                "data": {"train": str(folder / "train.json"), "max_length": 600},
                "lora": {"rank": 2},
                "training": training,
                "tracking": {"experiment": "tests", "registered_model": "tiny"},
            }
        )
    )
    assert (tuned["steps"], tuned["model_version"]) == (2, "tiny/1")
    captioning = {
        **shared,
        "name": "captions",
        "model": {"path": str(folder / "model"), "adapter": "models:/tiny/1", "dtype": "float32"},
        "input": {"source": str(folder / "images"), "limit": 3},
        "sampling": {"max_new_tokens": 2},
    }
    result = run_caption(CaptionConfig.model_validate(captioning))
    assert (result["captioned"], result["errors"]) == (3, {})
    assert sum(pq.read_metadata(file).num_rows for file in Path(result["captions"]).iterdir()) == 3


@pytest.mark.parametrize("name", ["plain", "100%", "a%20b", "what?", "a?b=%3F", "été #1"])
def test_the_file_of_a_sqlite_store_may_have_any_name(name: str, tmp_path: Path) -> None:
    uri = TrackingConfig().absolute_uri(tmp_path / name)
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")
    assert make_url(uri).query == {}
    assert sqlite_file(uri) == tmp_path / name / "mlflow.db"
    assert TrackingConfig(uri=uri).absolute_uri(tmp_path) == uri
