"""All applications work next to vLLM: a model is tuned, exported, and used by both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import skipvision as sv
from pipelines.caption.config import CaptionConfig
from pipelines.caption.job import run_caption
from pipelines.export.config import ExportConfig
from pipelines.export.job import run_export
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.job import run_finetune
from tests.backend import ENGINE, on_vllm

pytestmark = [on_vllm, pytest.mark.slow, pytest.mark.timeout(900)]
SKIP = {"retained": 4, "skipped": 0}


def test_a_model_is_tuned_exported_and_captions_by_both_engines(tiny_model, shapes_data, tmp_path, local_ray):
    shared: dict[str, Any] = {"storage": str(tmp_path), "tracking": {"experiment": "tests"}}
    on_one_cpu = {"scaling": {"cpus_per_worker": 1}}
    tuned = run_finetune(
        FinetuneConfig.model_validate(
            {
                **shared,
                **on_one_cpu,
                "name": "tuned",
                "model": {"path": str(tiny_model)},
                "data": {"train": str(shapes_data / "train.json"), "max_length": 600},
                "lora": {"rank": 2},
                "skip": SKIP,
                "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.05, "precision": "float32"},
            }
        )
    )
    model = {"path": str(tiny_model), "adapter": tuned["adapter"]}
    exported = run_export(ExportConfig.model_validate({**shared, "name": "exported", "model": model}))
    assert sv.attachment_of(sv.from_exported(exported["model"])).config == sv.SkipConfig(**SKIP)

    def captions(name: str, model: dict[str, str], engine: dict[str, Any]) -> list[dict[str, Any]]:
        config = CaptionConfig.model_validate(
            {
                **shared,
                **on_one_cpu,
                "name": name,
                "model": {**model, "dtype": "float32"},
                "input": {"source": str(shapes_data / "images"), "limit": 12},
                "engine": {"max_sequences": 4, "kv_budget_bytes": 2**22, **engine},
                "sampling": {"max_new_tokens": 16},
            }
        )
        rows = pq.read_table(Path(run_caption(config)["captions"])).to_pylist()
        return [{**row, "seconds": None, "model": None, "adapter": None} for row in rows]

    native = captions("native", model, {})
    assert len(native) == 12
    assert {row["visual_tokens_retained"] for row in native} == {4}
    assert captions("native-exported", {"path": exported["model"]}, {}) == native
    assert captions("vllm", model, ENGINE) == native
    assert captions("vllm-exported", {"path": exported["model"]}, ENGINE) == native
