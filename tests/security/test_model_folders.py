"""No code of a model folder ever runs (CVE-2026-27893, CVE-2026-7669, CVE-2026-5241), whoever answers yes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.folders import HOSTILE, RAN, hostile_folder

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)  # the first test waits for a process that imports everything

LOADERS = {"from_pretrained", "from_config", "get_class_from_dynamic_module", "snapshot_download"}
CHECKED_FIRST = ("job", "fine-tuning", "endpoint")
"""The ways that must refuse a folder before they start anything."""


def answering_yes(command: list[str], folder: Path, ran: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a standard input that answers yes for ever."""
    environment = {
        **os.environ,
        RAN: str(ran),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    yes = subprocess.Popen(["yes", "y"], stdout=subprocess.PIPE)
    try:
        return subprocess.run(
            command, stdin=yes.stdout, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
        )
    finally:
        yes.kill()
        yes.communicate()


@pytest.fixture(scope="module")
def outcomes(tiny_model, tmp_path_factory) -> dict[str, dict[str, str]]:
    """The outcomes of loading the hostile folders and the ``sound`` one, by way of loading."""
    parent = tmp_path_factory.mktemp("hostile")
    folders = {kind: hostile_folder(kind, tiny_model, parent) for kind in HOSTILE} | {"sound": tiny_model}
    command = [sys.executable, "-m", "tests.security.folders", *map(str, folders.values())]
    run = answering_yes(command, parent, parent / "ran")
    lines = [line[line.index('{"job"') :] for line in run.stdout.splitlines() if '{"job"' in line]
    assert len(lines) == len(folders), run.stderr[-2000:]
    return {kind: json.loads(line) for kind, line in zip(folders, lines, strict=True)}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_runs_no_code(outcomes, kind):
    for way, outcome in outcomes[kind].items():
        assert outcome.startswith(("loaded", "refused: ")), way


@pytest.mark.parametrize("kind", [kind for kind, (_, refusal) in HOSTILE.items() if refusal is not None])
def test_a_hostile_folder_is_refused_with_its_path_and_the_reason(outcomes, kind):
    for way in CHECKED_FIRST:
        outcome = outcomes[kind][way]
        assert kind.replace(" ", "-") in outcome, way
        assert HOSTILE[kind][1] in outcome, way


@pytest.mark.parametrize(
    "kind", ["sound", *(kind for kind, (_, refusal) in HOSTILE.items() if refusal is None)]
)
def test_a_folder_that_needs_none_of_its_code_loads(outcomes, kind):
    assert set(outcomes[kind].values()) == {"loaded"}


@pytest.mark.parametrize("job", ["caption", "finetune"])
def test_a_job_refuses_a_folder_with_code_before_ray_starts(job, tiny_model, tmp_path):
    folder = hostile_folder("unknown model type", tiny_model, tmp_path)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": "a.png", "conversations": []}]))
    settings = {"name": "x", "model.path": folder, "storage": tmp_path / "runs"}
    settings["input.source" if job == "caption" else "data.train"] = data
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    run = answering_yes([sys.executable, f"jobs/{job}.py", *arguments], tmp_path, tmp_path / "ran")
    assert not (tmp_path / "ran").exists()
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "Python code from its own folder" in run.stderr


def loads_outside(file: Path) -> list[str]:
    """The calls of a file that load something from Hugging Face."""
    tree = ast.parse(file.read_text())
    return [
        f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS
    ]


def test_one_file_loads_everything_and_trusts_no_code():
    loads = [
        load
        for package in ("skipvision", "pipelines", "serve", "jobs", "benchmarks")
        for file in sorted((ROOT / package).rglob("*.py"))
        for load in loads_outside(file)
    ]
    elsewhere = [load for load in loads if not load.startswith("skipvision/loading.py:")]
    # The files that they read hold no code.
    assert {load.split()[1] for load in elsewhere} == {
        "GenerationConfig.from_pretrained",
        "PeftConfig.from_pretrained",
        "PeftModel.from_pretrained",
    }
    assert len(loads) - len(elsewhere) == 4
    for node in ast.walk(ast.parse((ROOT / "skipvision/loading.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            trusted = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert trusted["trust_remote_code"] == "False", ast.unparse(node)
