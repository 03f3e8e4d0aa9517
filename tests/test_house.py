"""The structure and the language of the repository stay within their limits; `tests.house` measures them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.house import FOLDERS, PACKAGES, House, cycles, layers, markdown_prose, rendered_words

ROOT = Path(__file__).parents[1]
HOUSE = House(ROOT)

MAY_RE_EXPORT = {
    "skipvision/__init__.py",
    "skipvision/cost/__init__.py",
    "skipvision/testing/__init__.py",
    "skipvision/engine/__init__.py",
    "skipvision/analysis/__init__.py",
}
ONE_OF_A_KIND = {"skipvision/integrations/vllm/families"}
"""Rooms of modules of one kind, in which any module may be read first."""
SHORT_DOCSTRINGS: dict[str, str] = {}
"""Docstrings of four words or fewer that say enough: ``path::name`` and why."""
WORDS_THAT_FIT: dict[str, str] = {
    "tests/test_house.py": "it names the words",
    "What is in the picture?": "a question of the data set",
    "form that the question asks for": "people ask questions",
    "s3://pictures": "a name of a user's folder",
    "| pictures |": "a module of anatomy",
    '… "picture" …': "a key of result files",
    "which asks the engine a number": "a label in generated tables",
    "behind: Skip-Vision minus this point": "a key of the trade-off's result file",
}
"""Uses of words to avoid that are right: a part of the line that `House.words` reports, and why."""


# -------------------------------------------------------------------------------------------- structure


def test_no_file_is_longer_than_400_lines():
    assert [f"{file.path}: {file.lines}" for file in HOUSE.packaged() if file.lines > 400] == []


def test_no_class_is_longer_than_300_lines():
    assert [(lines, place) for lines, place in HOUSE.longest((ast.ClassDef,)) if lines > 300] == []


def test_the_median_file_has_140_lines_or_fewer():
    assert HOUSE.median() <= 140


def test_no_files_import_each_other():
    assert cycles(HOUSE.imports) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_rooms_import_each_other(package):
    assert cycles(HOUSE.rooms(package)) == []


def test_every_file_in_shared_is_needed_by_three_rooms():
    few = {path: sorted(rooms) for path, rooms in HOUSE.users_of_shared().items() if len(rooms) < 3}
    assert few == {}


def test_the_init_of_a_room_is_a_docstring_only():
    found = []
    for package in PACKAGES:
        for file in HOUSE.files[package]:
            if file.path.endswith("__init__.py") and file.path not in MAY_RE_EXPORT:
                body = [node for node in file.tree.body if not isinstance(node, ast.Expr)]
                found += [file.path] if body or not ast.get_docstring(file.tree) else []
    assert found == []


def test_the_init_of_a_room_names_all_its_modules():
    assert {room: parts for room, parts in HOUSE.unnamed_modules().items() if room not in ONE_OF_A_KIND} == {}


# --------------------------------------------------------------------------------------------- language


def test_a_docstring_has_more_than_four_words():
    found = [line for line in HOUSE.short_docstrings() if line.partition(": ")[0] not in SHORT_DOCSTRINGS]
    assert found == []


@pytest.mark.parametrize(
    "folder",
    [
        "skipvision",
        "pipelines",
        "serve",
        "jobs",
        "benchmarks",
        "tests",
        "pages",
        "others",
    ],
)
def test_words_that_make_readers_stumble_are_absent(folder):
    ours = [
        use
        for use in _words()
        if _group(use.split(":")[0]) == folder and not any(part in use for part in WORDS_THAT_FIT)
    ]
    assert ours == []


@functools.cache
def _words():
    return list(HOUSE.words())


def _group(path):
    if path.endswith(".md"):
        return "pages"
    return path.split("/")[0] if path.split("/")[0] in FOLDERS else "others"


def test_the_readme_has_1200_words_or_fewer():
    assert rendered_words((ROOT / "README.md").read_text(), tables=True) <= 1200


# ---------------------------------------------------------------------------------- the measuring itself


def house(folder: Path, **files: str) -> House:
    """A small repository whose files are given by their paths, with ``__`` for a slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(folder)


def test_cycles_and_layers_are_found(tmp_path):
    measured = house(
        tmp_path,
        serve__a__x="import serve.b.y\n",
        serve__b__y="def late():\n    from serve.c import z\n",
        serve__c__z="from serve.b import y\n",
        serve__d="",
    )
    rooms = measured.rooms("serve")
    assert rooms == {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert cycles(rooms) == [{"b", "c"}]
    assert layers(rooms) == 2
    assert cycles(measured.imports) == [{"serve.b.y", "serve.c.z"}]


def test_users_of_shared_files_are_counted_by_room(tmp_path):
    measured = house(
        tmp_path,
        pipelines__shared__paths="from pipelines.shared import files\n",
        pipelines__shared__files="",
        pipelines__score__job="from pipelines.shared import paths\n",
        pipelines__score__report="from pipelines.shared.paths import a\n",
        jobs__score="import pipelines.shared.paths\n",
        serve__config="import pipelines.shared.files\n",
    )
    users = {"pipelines.score", "jobs.score"}
    assert measured.users_of_shared() == {
        "pipelines.shared.paths": users,
        "pipelines.shared.files": users | {"serve"},
    }


def test_modules_that_the_init_does_not_name_are_found(tmp_path):
    measured = house(tmp_path, serve__a__one="", serve__a__two="")
    for path, text in (("serve/__init__.py", ""), ("serve/a/__init__.py", '"""Read `one`."""\n')):
        (tmp_path / path).write_text(text)
    assert measured.unnamed_modules() == {"serve/a": ["two"]}


def test_short_docstrings_and_words_are_found(tmp_path):
    source = '"""Of one."""\n\nLIMIT = 1\n"""The most."""\n\n# It is told to stop, and `mend` is code.\n'
    measured = house(tmp_path, serve__a=source)
    assert measured.short_docstrings() == [
        "serve/a.py::module: Of one.",
        "serve/a.py::LIMIT: The most.",
    ]
    assert [use.split(": ")[:2] for use in measured.words()] == [["serve/a.py:6", "told"]]


def test_words_are_found_in_pages_scripts_and_settings(tmp_path):
    texts = {
        "docs/LOG.md": "| tried | came of it |\n",
        "docs/draw.sh": "# Draw the pictures.\n",
        "serve/page/index.html": "<p>Nothing beside it.</p>\n",
        "serve/page/page.js": "// The server is away.\n",
        "pyproject.toml": "# What the tests need.\n",
        "Makefile": "# What is measured?\n",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = ["comes of", "picture", "What", "beside", "is away"]
    assert [use.split(": ")[1] for use in House(tmp_path).words()] == found


def test_rendered_words_leave_out_code_and_addresses():
    page = (
        "# A title\n\n[a page](docs/x.md) has `code`.\n\n    make demo\n\n```\nmore\n```\n\n| a | table |\n"
    )
    assert rendered_words(page) == 6
    assert rendered_words(page, tables=True) == 8
    assert markdown_prose(page).count("\n") == page.count("\n")
