"""The README and the pages of docs/ agree with the repository: files, links, commands, code and numbers."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import skipvision as sv
from pipelines.compare.report import check_marked
from tests.in_one_process import helps

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    ROOT / page for pattern in ("*.md", "docs/**/*.md", "models/**/*.md") for page in ROOT.glob(pattern)
)
TEXTS = {page: page.read_text() for page in PAGES}
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def in_pages(pattern: str, flags: int = 0) -> list[str]:
    """All matches of a pattern with one group, in all pages."""
    return sorted({found for text in TEXTS.values() for found in re.findall(pattern, text, flags)})


# ------------------------------------------------------------------------------------------- the tree


def tree() -> dict[str, Path]:
    """The files and folders that the tree of docs/architecture.md names, by their names in it."""
    body = next(
        body
        for body in re.findall(r"```\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
        if body.startswith("skipvision/")
    )
    folder, named = ROOT, {}
    for line in body.splitlines():
        for word in re.findall(r"[\w/-]+(?:\.py|/)(?=\s|$)", line):
            if not line.startswith(" "):
                folder = ROOT / word
                named[word] = folder
            else:
                named[f"{folder.name}/{word}"] = folder / word
    return named


def test_every_path_in_the_tree_exists():
    assert [name for name, path in tree().items() if not path.exists()] == []


def test_the_tree_names_every_module_and_every_room_of_the_packages():
    named = {path.resolve() for path in tree().values()}
    missing = [
        str(path.relative_to(ROOT))
        for package in ("skipvision", "pipelines", "serve", "jobs")
        for path in [ROOT / package, *(ROOT / package).iterdir()]
        if path.resolve() not in named
        and (
            (path.is_dir() and not path.name.startswith((".", "__")))
            or (package != "jobs" and path.suffix == ".py" and path.name != "__init__.py")
        )
    ]
    assert missing == []


# ------------------------------------------------------------------------------------- files and links


@pytest.mark.parametrize("target", in_pages(r"^    make ([a-z-]+)", re.MULTILINE))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", in_pages(r"jobs/[\w/]+\.(?:py|yaml)"))
def test_every_job_and_config_exists(path):
    assert (ROOT / path).exists()


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert [page for page in sorted(pages) if page not in index and not page.endswith("_table.md")] == []


# -------------------------------------------------------------------------------------- code and commands


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_code_uses_names_and_fields_that_exist(page):
    text = (ROOT / page).read_text()
    registered = re.findall(r'sv\.register_(?:criterion|merge)\("(\w+)"', text)
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sv":
                assert node.attr in sv.__all__
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "SkipConfig":
                given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
                given = {field: value for field, value in given.items() if value not in registered}
                assert sv.SkipConfig(**given)


def _length_of_name(words: list[str]) -> int:
    """Words that name a module and its subcommand."""
    if words[:2] == ["benchmarks", "run"]:
        return 3
    return 2 if words[0] in ("skipvision", "serve.keys", "benchmarks") else 1


def module_commands() -> dict[str, set[str]]:
    """The options in all commands ``python -m MODULE [SUBCOMMAND] --option``, by module."""
    options: dict[str, set[str]] = {}
    for text in TEXTS.values():
        joined = re.sub(r"\\\n\s*", "", text)
        for line in re.findall(r"^(?: {4,}|`)(?:\S*/)?python -m ([^`\n]*)", joined, flags=re.MULTILINE):
            words = shlex.split(line, comments=True)
            name = " ".join(words[: _length_of_name(words)])
            options.setdefault(name, set()).update(
                word.partition("=")[0] for word in words if word.startswith("--")
            )
    return options


@pytest.fixture(scope="module")
def module_helps():
    return helps(module_commands(), ROOT, modules=True)


@pytest.mark.parametrize("name", sorted(module_commands()))
def test_every_module_command_is_understood(name, module_helps):
    status, text = module_helps[name]
    assert status == 0, text
    assert module_commands()[name] <= set(re.findall(r"--[a-z][\w-]*", text))


# ---------------------------------------------------------------------------------------------- numbers


def test_the_demo_page_has_the_marks_of_its_table():
    check_marked(ROOT / "docs/demo.md")


def rows(page: str, section: str = "") -> list[list[str]]:
    """The rows of all tables of a page, from a line that contains ``section`` on, without bold marks."""
    text = (ROOT / page).read_text()
    text = text[text.index(section) :]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def cell(page: str, section: str, row: str, column: int) -> str:
    return next(cells[column] for cells in rows(page, section) if cells[0] == row)


def headline(start: str) -> list[str]:
    """The cells of the README's table in the row that starts so."""
    return next(cells for cells in rows("README.md") if cells[0].startswith(start))


@pytest.mark.parametrize(
    ("start", "section"),
    [
        ("prefill of 576", "### Prefill, bfloat16"),
        ("LoRA training step", "### LoRA training step, bfloat16"),
    ],
)
def test_the_quoted_times_are_those_of_the_benchmark(start, section):
    page = "docs/benchmarks/time_follows_flops.md"
    for column, setting in ((1, "full"), (2, "100+156")):
        measured = cell(page, section, setting, 3).partition(" ")[0]
        assert headline(start)[column] == f"{measured} ms"


def test_the_quoted_sequences_are_those_of_the_engine_benchmark():
    page, section = "docs/benchmarks/engine.md", "### Sequences in 64 MiB"
    assert headline("sequences")[0] == "sequences that fit into 64 MiB of KV cache"
    assert headline("sequences")[1] == cell(page, section, "full", 1)
    assert headline("sequences")[2] == cell(page, section, "100+156", 1)


def test_the_quoted_quality_is_that_of_the_longer_fine_tune():
    page = "docs/shapes_finetune.md"
    quality = headline("quality cost, tuned")
    assert quality[1] == f"{cell(page, '', 'overall', 1)} %"
    assert quality[2] == f"{cell(page, '', 'overall', 2)} %"
    assert f"at {cell(page, '', 'training FLOPs', 2)} of the training FLOPs" in quality[0]
    points, interval = re.fullmatch(r"(\S+) (\[.*\])", cell(page, "", "overall", 3)).groups()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"the difference is {points} points with a 95 % interval of {interval}" in readme


def test_the_quoted_quality_without_tuning_is_that_of_the_trade_off():
    quality = headline("quality cost without tuning")
    table = rows("docs/results/tradeoff_by_size_table.md")
    full = next(cells for cells in table if cells[0] == "full")
    sized = next(cells for cells in table if cells[:2] == ["skip-vision", "72 + 0"])
    assert sized[2].removesuffix(" of 30") < "30"
    assert (quality[1], quality[2]) == (f"{full[11]} %", f"{sized[11]} %")


def test_the_demo_page_explains_the_numbers_of_its_table():
    page = (ROOT / "docs/demo.md").read_text()
    before, _, tuned, skipped, gap = [
        float(value.partition(" ")[0])
        for value in next(r for r in rows("docs/demo.md") if r[0] == "overall")[1:]
    ]
    assert tuned < before
    assert f"the model tuned with full tokens: {gap:+.1f} points" in " ".join(page.split())
    assert f"is {before - skipped:.1f} points below the base model" in " ".join(page.split())
