"""The benchmarks that run vLLM, on sizes too small for meaningful numbers."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_benchmarks import SCRIPTS

ENGINES = ["--engines", "native", "vllm", "--kv-gib", "1", "--eager"]
PLUGIN = ["--parts", "engines", "plugin", "--plugin-images", "2", "--plugin-repeats", "2"]
ON_GPU = ["--engine", "vllm", "--settings", "8+0", "--concurrency", "1", "2", "--requests", "2"]


@pytest.mark.parametrize(("script", "options"), [("engines", [*ENGINES, *PLUGIN]), ("gpu", ON_GPU)])
def test_it_measures_and_reports(script, options, tmp_path):
    lines = tmp_path / "records.json"
    page = ["--out", str(tmp_path / "page.md")]
    run(script, *SCRIPTS[script], *options, "--json", str(lines), *page)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    measured = [(one["engine"], one["setting"], one["concurrency"]) for one in records if "engine" in one]
    engines = ["native", "vllm"] if script == "engines" else ["vllm"]
    assert sorted(measured) == [(one, name, c) for one in engines for name in ("8+0", "full") for c in (1, 2)]
    for record in records:
        if record["part"] == "plugin":
            # vLLM encodes and prunes inside of a step.
            for part, encoder, step in zip(
                record["plugin"], record["encoder"], record["prefill"], strict=True
            ):
                assert 0 < part < part + encoder < step
    text = run(script, "--report", str(lines), *page)
    assert "vllm, 8+0" in text
    assert ("share of CPU time" in text) == (script == "engines")


def run(script, *options):
    command = [sys.executable, "-m", "benchmarks", "run", script, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
