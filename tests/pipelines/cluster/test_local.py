"""A separate Ray on this machine runs jobs, reports failed ones, and ends without touching another Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from pipelines.cluster.local import JobFailedError, local_ray

pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_jobs_run_and_no_process_remains_and_another_ray_is_untouched(
    local_ray_session, tmp_path, capfd, monkeypatch
):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # another cluster, which must get no job
    before = {process.pid for process in psutil.process_iter()}
    out = tmp_path / "out.txt"
    with local_ray() as own:
        code = "import os, pathlib; pathlib.Path(os.environ['OUT']).write_text('done'); print('a', end=' b')"
        own.submit(["python", "-c", code], environment={"OUT": str(out)})
        assert out.read_text() == "done"
        command, *lines = capfd.readouterr().out.splitlines()
        assert command.startswith("$ ray job submit --address http://127.0.0.1:")
        assert lines == ["a b"]
        with pytest.raises(JobFailedError, match=r"`python -c 'raise SystemExit\(3\)'` failed.* exit code 3"):
            own.submit(["python", "-c", "raise SystemExit(3)"], environment={})
    started = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    assert not [p for p in started if any("skipvision-ray-" in part for part in p.info["cmdline"] or ())]
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


@pytest.fixture
def local_ray_session(request: pytest.FixtureRequest) -> None:
    """Start the test session's Ray, which is the other one."""
    request.getfixturevalue("local_ray")


RUN = """
import os, sys
from pipelines.shared.config import run_job
from pipelines.cluster.local import local_ray

def main(argv):
    with local_ray() as ray:
        print("ready", flush=True)
        ray.submit(["python", "-c", os.environ["JOB"]], environment={"OUT": os.environ["OUT"]})

run_job(main, [])
"""
JOB = """
import os, pathlib, time
from pipelines.shared.config import run_job

def main(argv):
    out = pathlib.Path(os.environ["OUT"])
    try:
        out.write_text("runs")
        time.sleep(100)
    finally:
        out.write_text("cleaned up")

run_job(main, [])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, signal.SIGINT],
)
def test_a_signal_ends_the_job_and_the_ray(number, tmp_path):
    out = tmp_path / "out.txt"
    job = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(out), "JOB": JOB},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (out.exists() and out.read_text()) and time.monotonic() < end and job.poll() is None:
        time.sleep(0.2)
    [folder] = folders_of(job.pid)
    job.send_signal(number)
    output, errors = job.communicate(timeout=90)
    assert job.returncode == 128 + number, output + errors
    assert out.read_text() == "cleaned up"
    assert not folder.exists()
    assert "Traceback" not in errors
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())
    ]


def folders_of(pid: int) -> set[Path]:
    """Return the temporary folders of the Rays that a process started."""
    words = {word for child in psutil.Process(pid).children() for word in child.cmdline()}
    return {Path(word.partition("=")[2]) for word in words if word.startswith("--temp-dir=")}
