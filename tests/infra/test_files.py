"""Every file in infra/ can be read, and every kind of file has a test of its contents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import INFRA

FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())
TESTS = {
    r"image/(Dockerfile|mlflow\.txt)": "test_image.py",
    r"compose/(compose(\.cuda)?\.yaml|\.env\.example|prometheus\.yaml|grafana/\w+\.yaml)": "test_compose.py",
    r"kuberay/.*\.yaml": "test_kuberay.py",
    r"ray-cluster/(aws|gcp)\.yaml": "test_ray_configs.py",
    r"(grafana/\w+\.json|prometheus/rules(_test)?\.yaml)": "test_monitoring.py",
}
"""Which file tests what, by a pattern of the path below infra/."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_file_has_a_test_and_can_be_read(path):
    name = str(path.relative_to(INFRA))
    tests = [test for pattern, test in TESTS.items() if re.fullmatch(pattern, name)]
    assert len(tests) == 1, f"name the test of {name} in TESTS"
    assert (Path(__file__).parent / tests[0]).exists()
    text = path.read_text()
    if path.suffix == ".yaml":
        assert list(yaml.safe_load_all(text)), name
    elif path.suffix == ".json":
        assert json.loads(text), name


def test_every_pattern_has_a_file():
    names = [str(path.relative_to(INFRA)) for path in FILES]
    assert [pattern for pattern in TESTS if not any(re.fullmatch(pattern, name) for name in names)] == []


def test_no_file_holds_a_secret():
    assigned = re.compile(r"(?i)(?:password|secret_?key|token)\s*[:=]\s*([\w/+-]{8,})\s*$", re.MULTILINE)
    assert {str(path): found for path in FILES if (found := assigned.findall(path.read_text()))} == {}
