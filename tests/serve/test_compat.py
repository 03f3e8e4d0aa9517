"""Private names of other libraries are used in `serve/_compat.py` alone."""

import ast
import re
from pathlib import Path

import pytest

import serve

FOLDER = Path(serve.__file__).parent


def private(name):
    return name.startswith("_") and not name.endswith("__")


def private_uses(source):
    """Private modules and names that are imported, and private parameters that are passed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords if keyword.arg]
        elif isinstance(node, ast.Attribute):
            names = [node.attr] if node.attr == "__ray_call__" else []
        else:
            continue
        yield from (name for name in names if name == "__ray_call__" or private(name))


@pytest.mark.parametrize(
    "source",
    [
        "from ray.serve._private import constants",
        "import ray._private.worker",
        "from starlette import _utils",
        "serve.delete('x', _blocking=False)",
        "actor.__ray_call__",
    ],
)
def test_private_uses_are_found(source):
    assert len([*private_uses(source)]) == 1


def test_only_one_file_uses_private_names():
    files = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.rglob("*.py")}
    used = {name: {*private_uses(source)} - {"_compat"} for name, source in files.items()}
    assert used.pop("_compat.py") >= {"_private", "_by_reference", "_blocking", "__ray_call__"}
    assert {name: names for name, names in used.items() if names} == {}


def test_every_private_name_has_the_version_that_it_was_seen_in():
    tree = ast.parse((FOLDER / "_compat.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert functions
    for function in functions:
        version = re.search(r"(Ray|FastAPI) \d+\.\d+\.\d+", ast.get_docstring(function))
        assert version, function.name
