"""Every benchmark runs, on sizes too small for meaningful numbers, and the pages agree with their JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._figures import tables
from benchmarks._record import read_page, write_part
from benchmarks._registry import BENCHMARKS

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/benchmarks"
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
    "training": [
        *(
            "--ways",
            "Trainer",
            "SFTTrainer",
            "full",
            SETTING,
            "--batch",
            "2",
            "--batches",
            "1",
            "--repeats",
            "1",
        ),
        *(
            "--hidden",
            "64",
            "--layers",
            "1",
            "--image",
            "84",
            "--dtype",
            "float32",
            "--attention-repeats",
            "1",
        ),
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
    command = [sys.executable, "-m", "benchmarks", "run", script, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_script_is_listed_and_has_a_small_size():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if not path.stem.startswith("_")}
    assert scripts == {benchmark.name for benchmark in BENCHMARKS}
    assert scripts == set(SCRIPTS)


def test_the_list_needs_no_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for benchmark in BENCHMARKS:
        assert f"{benchmark.name}\n" in done.stdout


@pytest.mark.parametrize("file", sorted(PAGES.glob("*.json")), ids=lambda file: file.stem)
def test_the_json_has_the_numbers_of_its_page(file):
    page = file.with_suffix(".md").read_text()
    assert json.loads(file.read_text()) == read_page(page), "run: python -m benchmarks figures"


def test_the_tables_that_compare_pages_are_theirs():
    page = (PAGES / "README.md").read_text()
    for text in tables(PAGES).values():
        assert text in page, "run: python -m benchmarks figures"


def test_a_record_has_command_conditions_and_numbers(tmp_path):
    page = tmp_path / "new" / "page.md"
    conditions = "2026-01-02; a CPU, 2 cores; Python 3.11, torch 2; bfloat16; load average 1.0"
    first = "### Title\n\n| a | b |\n| --- | ---: |\n| x, y | **1.17** |"
    second = "| a | b |\n| --- | ---: |\n| 1,000 (900 – 1,100) | 4.3% |\n| – | 10 MB |"
    write_part(
        page, "one", f"`python -m benchmarks run engine`\n\n{conditions} before, 2.0 after.\n\n{first}"
    )
    write_part(page, "two", f"{conditions}.\n\n{second}")
    records = json.loads(page.with_suffix(".json").read_text())
    assert records["one"] == {
        "command": "python -m benchmarks run engine",
        "date": "2026-01-02",
        "machine": "a CPU, 2 cores",
        "versions": ["Python 3.11, torch 2"],
        "load": "1.0 before, 2.0 after",
        "conditions": ["bfloat16"],
        "notes": [],
        "tables": [{"title": "Title", "rows": [{"a": "x, y", "b": 1.17}]}],
    }
    assert records["two"]["tables"][0]["rows"] == [
        {"a": {"median": 1000.0, "low": 900.0, "high": 1100.0}, "b": 0.043},
        {"a": None, "b": "10 MB"},
    ]


def test_a_part_needs_its_place_in_a_page_with_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(SystemExit, match="no markers"):
        write_part(page, "one", "new")


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
    (record,) = json.loads(page.with_suffix(".json").read_text()).values()
    assert record["command"].startswith("python -m benchmarks")
    assert record["machine"]
    assert record["versions"]
    assert record["tables"]


@pytest.mark.slow
def test_the_gpu_script_measures_and_reports_without_the_requirements_of_other_scripts(tmp_path):
    lines, page = tmp_path / "gpu.jsonl", tmp_path / "gpu.md"
    absent = ["ray", "matplotlib", "pydantic_settings", "mlflow", "fastapi", "pyarrow", "scipy"]
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({absent})); "
    code += "runpy.run_module('benchmarks', run_name='__main__')"
    pieces = ["prefill", "decode", "train"]
    options = [*SCRIPTS["gpu"], "--pieces", *pieces, "--json", str(lines), "--out", str(page)]
    command = [sys.executable, "-c", code, "run", "gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["piece"] for record in records if record["setting"] == "full"] == pieces
    assert len(read_page(page.read_text())["table"]["tables"]) == len(pieces)
    assert "|" in run("gpu", "--report", str(lines), "--out", str(page))
