"""Both wheels, installed outside the repository into an environment that has nothing else of this project."""

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = ("skipvision", "pipelines", "serve", "apps", "pyproject.toml", "README.md", "LICENSE")
MAY_BE_ABSENT = {"lmms_eval", "vllm"}
"""Optional imports, of files that only another program loads."""
BROUGHT_BY = {
    "pydantic_core": "pydantic",
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "starlette": "fastapi",
    "yarl": "aiohttp",
    "click": "ray",
}
"""Imports whose distribution is required by one that we require, and whose versions that one chooses."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The top-level packages and files of each wheel, built from a copy of the sources, by distribution."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist", ".", "./apps", cwd=copy)
    return {wheel.name.partition("-")[0]: wheel for wheel in (copy / "dist").iterdir()}


@pytest.fixture(scope="module")
def node(wheels, tmp_path_factory):
    """Runs Python in a clean environment that has the wheels and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("node")
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    pip("--python", python, "install", "--no-deps", *wheels.values(), cwd=folder)
    # A .pth file adds the folder of the dependencies, but not their .pth files: no editable installation.
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(paths)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        command = [python, *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout

    return run


def pip(*arguments, cwd):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    if "--python" in arguments:  # an option of pip itself
        command += arguments[: (at := arguments.index("--python") + 2)]
        arguments = arguments[at:]
    command += [arguments[0], "--no-index", *arguments[1:]]
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def content(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def files(*packages):
    """The files in the repository's packages, as a wheel names them."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def loaded(node, statement):
    """The top-level modules that are loaded after a statement."""
    return set(json.loads(node("-c", f"{statement}; import json, sys; print(json.dumps([*sys.modules]))")))


def test_the_library_and_the_applications_are_two_wheels(wheels):
    assert content(wheels["skipvision"]) == files("skipvision")
    assert content(wheels["skipvision_apps"]) == files("pipelines", "serve")


def test_the_applications_need_the_library_of_their_version():
    library, applications = (
        tomllib.loads((ROOT / place / "pyproject.toml").read_text())["project"] for place in (".", "apps")
    )
    for name in ("version", "requires-python", "license"):
        assert applications[name] == library[name]
    assert applications["dependencies"] == [f"skipvision[apps]=={library['version']}"]
    assert "apps" in library["optional-dependencies"]


def imported(package):
    """The top-level packages of others that the files of one of our packages import."""
    ours = {"skipvision", "pipelines", "serve"}
    names = set()
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - ours - set(sys.stdlib_module_names)


def required(wheel, *extras):
    """The distributions that a wheel requires, without extras and with these."""
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    return {
        canonicalize_name(one.name)
        for one in requirements
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


@pytest.mark.parametrize("package", ["skipvision", "pipelines", "serve"])
def test_the_wheels_require_what_their_packages_import(wheels, package):
    """The environment of `node` has all dependencies of the tests, so it would not miss one."""
    extras = () if package == "skipvision" else ("apps", "tracing")
    distributions = packages_distributions()
    known = required(wheels["skipvision"], *extras)
    missing = {
        name
        for name in imported(package) - MAY_BE_ABSENT - BROUGHT_BY.keys()
        if not {canonicalize_name(one) for one in distributions.get(name, [name])} & known
    }
    assert missing == set()


@pytest.mark.parametrize("name", sorted(BROUGHT_BY))
def test_a_required_distribution_brings_what_it_is_relied_on_for(wheels, name):
    carrier = BROUGHT_BY[name]
    assert carrier in required(wheels["skipvision"], "apps")
    brought = {canonicalize_name(Requirement(line).name) for line in requires(carrier)}
    assert canonicalize_name(name) in brought


def test_a_proxy_finds_its_middleware_on_a_node(node):
    where = node("-c", "import serve.front; print(serve.front.__file__, serve.front.middlewares())")
    assert "site-packages" in where
    assert str(ROOT) not in where
    assert "Front" in where


def test_the_middleware_loads_no_model_code(node):
    assert not loaded(node, "import serve.front") & {"torch", "transformers", "skipvision", "mlflow"}


def test_the_application_can_be_built_on_a_node(node):
    assert "site-packages" in node("-c", "import serve.app; print(serve.app.build and serve.app.__file__)")


def test_keys_can_be_made_on_a_node(node):
    assert "python -m serve.keys" in node("-m", "serve.keys", "--help")


def test_the_page_comes_with_all_its_files(node):
    served = node("-c", "import serve.page.routes; print(*serve.page.routes.FOLDER.iterdir())").split()
    suffixes = {".html", ".css", ".js"}
    names, expected = (
        {path.name for path in paths if path.suffix in suffixes}
        for paths in (map(Path, served), (ROOT / "serve/page").iterdir())
    )
    assert names == expected
    assert {"index.html", "page.css", "page.js"} <= names


def test_importing_the_library_loads_no_framework_of_the_applications(node):
    modules = loaded(node, "import skipvision")
    assert "torch" in modules
    assert not modules & {"ray", "mlflow", "fastapi", "pipelines", "serve"}
