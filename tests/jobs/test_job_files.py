"""Rules for every file in jobs/ and jobs/configs/, present and future."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from skipvision.select import CRITERIA
from tests.in_one_process import helps

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
DOCUMENTED = [
    re.sub(r"\\\n\s*", "", line)
    for file in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")])
    for line in re.findall(r"^    .*python (jobs/(?:.*\\\n)*.*)$", file.read_text(), flags=re.MULTILINE)
    if "--help" not in line
]


def job_of(config: Path) -> Path:
    """A config is named after its job or its last words: ``shapes_demo.yaml`` is for ``make_shapes.py``."""
    words = config.stem.split("_")
    names = {"_".join(words[:end]) for end in range(1, len(words) + 1)}
    jobs = [job for job in JOBS if any(f"_{job.stem}".endswith(f"_{name}") for name in names)]
    assert len(jobs) == 1, f"{config.name} belongs to {[job.name for job in jobs] or 'no job'}"
    return jobs[0]


class Loaded(Exception):
    """The job has read its settings."""


def load(job_file: Path, argv: list[str], monkeypatch) -> None:
    """Let a job read its settings and stop."""
    job = importlib.import_module(f"jobs.{job_file.stem}")
    load_config = job.load_config

    def load_and_stop(*args, **kwargs):
        load_config(*args, **kwargs)
        raise Loaded

    monkeypatch.setattr(job, "load_config", load_and_stop)
    with pytest.raises(Loaded):
        job.main(argv)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_config_is_accepted_by_its_job(config, monkeypatch):
    load(job_of(config), ["--config", str(config)], monkeypatch)


@pytest.mark.parametrize("line", DOCUMENTED)
def test_every_documented_command_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    # docs/library.md registers this criterion in a module of its own.
    monkeypatch.setitem(CRITERIA._methods, "variance", CRITERIA["norm"])
    script, *argv = shlex.split(line, comments=True)
    load(ROOT / script, argv, monkeypatch)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The help of every job, from a folder outside of the repository, and that folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return helps(map(str, JOBS), folder), folder


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_prints_its_help_in_any_folder(job, elsewhere):
    texts, folder = elsewhere
    status, text = texts[str(job)]
    assert status == 0, text
    usage, _, description = text.splitlines()[:3]
    assert usage.startswith(f"usage: {job.name} ")
    assert description
    assert not list(folder.iterdir())


def test_no_job_hides_a_library():
    """``python jobs/x.py`` puts jobs/ on the path, where a job named like a library would hide it."""
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert not [job.name for job in JOBS if job.stem in taken]
