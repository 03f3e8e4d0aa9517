"""A Ray of one's own: it takes jobs, says when they fail, and ends without touching another."""

from __future__ import annotations

import psutil
import pytest
import ray

from pipelines.local_ray import JobFailedError, local_ray

pytestmark = pytest.mark.timeout(300)


def test_jobs_run_and_nothing_is_left_or_disturbed(local_ray_session, tmp_path, capfd):
    before = {process.pid for process in psutil.process_iter()}
    out = tmp_path / "said.txt"
    with local_ray() as own:
        said = "import os, pathlib; pathlib.Path(os.environ['OUT']).write_text('done')"
        own.submit(["python", "-c", said], environment={"OUT": str(out)})
        assert out.read_text() == "done"
        with pytest.raises(JobFailedError, match="raise SystemExit"):
            own.submit(["python", "-c", "raise SystemExit(3)"], environment={})
    started = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    assert not [p for p in started if any("skipvision-ray-" in part for part in p.info["cmdline"] or ())]
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


@pytest.fixture
def local_ray_session(request: pytest.FixtureRequest) -> None:
    """The test session's Ray is the other one."""
    request.getfixturevalue("local_ray")
