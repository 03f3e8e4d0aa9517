"""Every script under benchmarks/ runs, on sizes too small for meaningful numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTING = "8+12"
SCRIPTS = {
    "time_follows_flops": [
        *(
            "--hidden",
            "64",
            "--layers",
            "2",
            "--image",
            "84",
            "--text",
            "8",
            "--answer",
            "4",
            "--repeats",
            "1",
        ),
        *("--dtype", "float32", "--settings", SETTING),
    ],
    "planning": [
        *("--select", "similarity", "--tokens", "36", "--batch", "2", "--width", "64", "--repeats", "1"),
        *("--prefill", "36x1", "--hidden", "64", "--layers", "2", "--prefill-repeats", "1"),
    ],
    "engine": [
        *("--setting", SETTING, "--requests", "3", "--batch", "2", "--repeats", "1", "--budget-mib", "16"),
        *("--decode-rows", "1", "2", "--steps", "2", "--hidden", "64", "--layers", "1"),
    ],
    "engines": [
        *(
            "--setting",
            "8+0",
            "--concurrency",
            "1",
            "2",
            "--requests",
            "2",
            "--repeats",
            "1",
            "--image",
            "84",
        ),
        *("--hidden", "64", "--layers", "1", "--dtype", "float32", "--kv-gib", "0.1"),
    ],
    "serve_faults": [
        *("--rate", "2", "--seconds", "6", "--tokens", "8"),
        *("--cases", "nothing", "half of the images oversized or hostile"),
    ],
    "serve_load": ["--parts", "overhead", "--requests", "3", "--tokens", "4"],
    "scale": ["--rows", "200", "1500", "--blocks", "160", "--requests", "8"],
    "caption_job": ["--rows", "4", "--sequences", "2", "--repeats", "1"],
    "gpu": [
        "--device",
        "cpu",
        "--tiny",
        "--dtype",
        "float32",
        "--batch",
        "1",
        "--repeats",
        "1",
        "--steps",
        "2",
    ],
}


def run(script: str, *options: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_script_has_a_small_size():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_")}
    assert scripts == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"gpu"}))
def test_a_script_writes_its_part_of_a_page(script, tmp_path, shapes_data):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: here -->\n<!-- end: here -->\nafter\n")
    where = {"caption_job": ["--images", str(shapes_data / "images/train")]}
    options = where.get(script, [] if script.startswith(("serve", "scale")) else ["--threads", "1"])
    run(script, *SCRIPTS[script], *options, "--out", str(page), "--part", "here")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| --- |" in text


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["prefill", "train", "decode"])
def test_the_gpu_script_measures_and_reports(piece, tmp_path):
    lines = tmp_path / "gpu.jsonl"
    run("gpu", *SCRIPTS["gpu"], "--piece", piece, "--out", str(lines))
    assert lines.read_text().count("\n") >= 2
    assert "|" in run("gpu", "--report", str(lines))
