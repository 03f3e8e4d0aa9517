"""The README's first command and what the docs do with its results: score, calibrate, decide.

Two tiny steps of training leave adapters that answer as the base model does: this tests the way, not numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme_runs import ROOT, SMALL, command, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "skipvision", "pipelines", "serve", "jobs", "models"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def demo(home: Path) -> str:
    """What `make demo` prints, with fewer steps."""
    fewer = json.dumps([*SMALL["finetune.py"].split(), "--training.learning_rate", "1e-6"])
    line = [sys.executable, "jobs/demo.py", "--overrides", fewer]
    return run(line, home, SKIPVISION_HOME=str(home)).stdout


def result(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """The JSON line in which a job ends."""
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_demo_compares_both_runs_and_captions_a_folder(demo, home):
    assert "| overall |" in demo
    assert (home / "runs/demo-against-demo-full/comparison.png").exists()
    for name in ("demo", "demo-full"):
        assert (home / "runs" / name / "adapter/adapter_config.json").exists()
    assert len([line for line in demo.splitlines() if line.startswith("  0000")]) == 4, "captions"
    assert len([line for line in demo.splitlines() if line.startswith("| 144+144 |")]) == 2, (
        "prefill and step"
    )


def test_the_adapter_is_scored_and_the_decision_recorded(demo, home):
    scored = result(run(command("score.py"), home))
    assert (home / "runs/demo-score/items/skip/items.parquet").exists(), scored
    line = command("promote.py")
    decided = subprocess.run(line, cwd=home, capture_output=True, text=True)
    assert decided.returncode in (0, 1), decided.stderr
    assert "| overall |" in decided.stdout, "the table of the decision"
    if decided.returncode:
        assert "does not become 'champion'" in decided.stderr


def test_a_config_is_found_by_calibration(demo, home):
    space = '{"retained": [0.25], "skipped": [0.125, 0.25], "select": ["diversity"]}'
    line = [*command("calibrate.py"), "--space", space, "--budget.accuracy_drop", "0.5"]
    assert result(run(line, home))["skip"] == str(home / "runs/demo-calibration/skip.yaml")
