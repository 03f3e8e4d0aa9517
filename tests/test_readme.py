"""What the README says exists: its files, its commands, its options, its picture of the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import skipvision as sv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SECTIONS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [body for language, body in SECTIONS if language == "python"]
TREE = next(body for _, body in SECTIONS if body.startswith("skipvision/"))


def test_every_path_in_the_tree_is_there_and_no_module_of_the_library_is_missing():
    folder, named = ROOT, set()
    for line in TREE.splitlines():
        for word in re.findall(r"[\w/-]+(?:\.py|/)(?=\s|$)", line.split("   the ")[0]):
            if not line.startswith(" "):
                folder = ROOT / word
                assert folder.is_dir(), word
            else:
                assert (folder / word).exists(), word
                named.add(word)
    modules = {path.name for path in (ROOT / "skipvision").glob("*.py")} - {"__init__.py"}
    assert named & modules == modules


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE)))
)
def test_every_make_target_is_there(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"jobs/[\w/]+\.(?:py|yaml)", README))))
def test_every_job_and_config_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_link_leads_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()


def test_the_code_uses_names_and_fields_that_exist():
    for code in PYTHON:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sv":
                assert node.attr in sv.__all__
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "SkipConfig":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
                assert sv.SkipConfig(**given)
