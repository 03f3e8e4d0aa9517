"""Whole jobs on a disk that fills while they work: a message, and the same command continues afterwards."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.shared.config import run_job
from pipelines.tracking.config import TrackingConfig
from tests.pipelines.disk import Disk
from tests.pipelines.score.tables import PLAIN, png, table
from tests.pipelines.spine_jobs import Inputs, caption, finetune, score

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.timeout(600),
]


def settings_of_caption(inputs: Inputs) -> dict[str, Any]:
    settings = caption(inputs)
    del settings["model"]["adapter"], settings["input"]["limit"]
    return settings


JOBS = {
    "checkpoint": ("finetune", finetune, "64k", "checkpoints/checkpoint_00000002: No space left on device"),
    "list of checkpoints": ("finetune", finetune, "96k", r"checkpoints\S*: No space left on device"),
    "later checkpoint": ("finetune", finetune, "136k", r"checkpoints\S*: No space left on device"),
    "captions": ("caption", settings_of_caption, "72k", "No space left on device"),
    "answers": ("score", score, "60k", "No space left on device"),
    "store of MLflow": ("finetune", finetune, "300k", "MLflow failed at .*: No space left on device"),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_continues_once_its_disk_has_room(
    name: str,
    disk: Disk,
    tiny_model: Path,
    shapes_data: Path,
    local_ray: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    table(
        tmp_path / "questions.tsv",
        [{"index": n, "image": png(n), **PLAIN, "answer": "red"} for n in range(8)],
    )
    job, settings_of, size, words = JOBS[name]
    settings = settings_of(Inputs(tmp_path, tiny_model, shapes_data, tmp_path, disk.path))
    settings |= {"name": "job", "storage": str(disk.path)}
    if name != "store of MLflow":
        store = TrackingConfig().absolute_uri(tmp_path)
        settings["tracking"] = {**settings.get("tracking", {}), "uri": store}
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(settings))
    main = importlib.import_module(f"jobs.{job}").main
    disk.grow(size)
    with pytest.raises(SystemExit) as end:
        run_job(main, ["--config", str(file)])
    last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1
    assert len(last) == 1
    assert str(disk.path) in last[0]
    assert re.search(words, last[0])
    assert last[0].endswith("free space there, then run the same job again to continue")
    disk.grow("20m")
    run_job(main, ["--config", str(file)])
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert not result["already_finished"]
    images = len(list((shapes_data / "images").glob("*/*")))
    done = {
        "finetune": {"steps": 12},
        "caption": {"captioned": images},
        "score": {"errors": {"full": {"mine": 0}}},
    }
    assert done[job].items() <= result.items()
