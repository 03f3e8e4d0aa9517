"""No name of a run, model, alias, adapter or page file leads out of its folder (CVE-2026-2614)."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from pipelines.caption.config import CaptionConfig
from pipelines.finetune.config import FinetuneConfig
from pipelines.tracking.registry import exact_model
from serve.page.routes import page_routes
from skipvision.errors import ConfigError

LEAVING = (
    "../x", "..", "../../etc/passwd", "a/../../x", "/etc/passwd", "..\\x", "%2e%2e/x", "x/..", "./x", "~/x",
    "x\x00y", "x\ny", "", " ", "-rf", ".hidden", "file:///etc/passwd", "s3://bucket/x", "x?y", "x#y", "x;y",
)  # fmt: skip


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("job", [CaptionConfig, FinetuneConfig])
def test_the_name_of_a_run_stays_in_its_storage(job, name):
    with pytest.raises(ValueError, match=r"(?s)\bname\b.*should match pattern"):
        job.model_validate({"name": name})


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "..@x", "a/b/c", "@", "a@../x", "a/..", "a/../../x", "a@b@c"]
)
def test_a_registered_name_stays_in_the_registry(name, tmp_path):
    # The registry does not exist, so a name that is looked up is another error.
    with pytest.raises(ConfigError, match="names no model"):
        exact_model(f"sqlite:///{tmp_path}/none.db", f"models:/{name}")


@pytest.fixture(scope="module")
def page() -> TestClient:
    app = FastAPI()
    app.include_router(page_routes())
    return TestClient(app)


@pytest.mark.parametrize(
    "name", ["../routes.py", "..%2froutes.py", "%2e%2e/routes.py", "routes.py", "__init__.py",
             "page.js/../routes.py", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "page.js%00", "PAGE.JS", "",
             "/etc/passwd"]
)  # fmt: skip
def test_the_page_serves_its_own_files_only(page, name):
    assert page.get(f"/page/{name}").status_code == 404


RANGES = {
    "many ranges": "bytes=" + ",".join(f"{n}-{n + 1}" for n in range(0, 200_000, 3)),
    "overlapping ranges": "bytes=" + ",".join(["0-"] * 100_000),
    "a range of one digit many times": "bytes=" + "1" * 1_000_000 + "-",
    "reversed": "bytes=9-0",
    "outside": "bytes=99999999-",
    "negative": "bytes=--5",
    "another unit": "lines=0-5",
    "spaces": "bytes=" + " " * 1_000_000,
    "commas": "bytes=" + "," * 1_000_000,
    "dashes": "bytes=" + "-" * 1_000_000,
    "words": "bytes=a-b",
}


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.timeout(60)
def test_a_range_header_costs_no_time(page, kind):
    """CVE-2025-62727: ranges were merged in quadratic time."""
    import time

    begin = time.process_time()
    response = page.get("/page/page.js", headers={"Range": RANGES[kind]})
    assert time.process_time() - begin < 5
    assert response.status_code in (200, 206, 400, 416)
    assert len(response.content) < 100_000


def test_a_range_is_answered_in_part(page):
    whole = page.get("/page/page.js")
    part = page.get("/page/page.js", headers={"Range": "bytes=2-5"})
    assert (part.status_code, part.content) == (206, whole.content[2:6])
