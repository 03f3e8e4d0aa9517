"""Measure the structure and the language of the repository: ``python -m tests.house --lists``.

A *room* is a folder or a module directly inside one of the packages. Imports are read from the source,
including those inside functions and under ``TYPE_CHECKING``. `test_house` holds the limits.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

PACKAGES = ("skipvision", "pipelines", "serve")
FOLDERS = (*PACKAGES, "jobs", "benchmarks", "tests")

SUFFIXES = (".sh", ".html", ".js", ".css", ".yaml", ".toml")

Graph = Mapping[str, set[str]]

WORDS = {
    "behind": r"(?<!left )(?<!far )\bbehind\b(?! HAProxy| (?:a|the|one|Ray's) (?:HTTP )?(?:prox|load))",
    "beside": r"\bbeside\b",
    "told": r"\btold\b",
    "said": r"\bsaid\b",
    "let in": r"\blets? in\b",
    "put back": r"\bputs? (?:\w+ )?back\b|\bputting (?:\w+ )?back\b",
    "hand in": r"\bhand(?:s|ed|ing)? (?:it |them )?in\b",
    "mend": r"\bmend(?:s|ed|ing)?\b",
    "is asked": r"\b(?:is|are|was|were|be|been) asked\b",
    "likewise": r"\blikewise\b",
    "that which": r"\bthat which\b",
    "there is one": r"\b(?:there is|is there) one\b|\bif there is one\b",
    "as far as": r"\bas far as\b",
    "stands for": r"\bstands? for\b",
    "comes of": r"\b(?:comes?|came|coming) of\b",
    "goes on": r"\bgoes on\b|\bgo on\b|\bgoing on\b",
    "lies in": r"\blies in\b|\blie in\b",
    "as it is": r"(?<!soon )\bas it is\b|\bas they are\b",
    "asks": r"(?<!question )\basks\b|\b(?:engine|job|replica|ingress|proxy|server|client|page) ask\b",
    "picture": r"(?<!anatomy/)\bpictures?\b(?!\.(?:py|png)|\"\]|\?|\": )",
    "what is wrong": r"\bwhat is wrong\b",
    "What": r"\A(?:\"\"\"|# ?)What\b(?!.*\?)",
    "who reaches": r"(?<!anyone )(?<!everyone )\bwho (?:reaches|reads|has)\b",
    "wants": r"\bwants? (?:an?|the|no)\b",
    "leads nowhere": r"\bleads? nowhere\b",
    "is away": r"\b(?:is|are|was|were) away\b(?! from)",
    "as a rule": r"\bas a rule\b",
    "for want of": r"\bfor want of\b",
    "holds anything": r"\b(?:holds?|held) anything\b",
    "says nothing": r"\bsays? nothing\b(?! about)",
    "by us": r"\bby us\b",
    "as it has it": r"\bas \w+ (?:has|have) it\b",
    "to no other": r"\band to no other\b|\band no further\b",
}
"""Words that make readers stumble, with the pattern that finds each."""


@dataclass(frozen=True)
class File:
    """One source file, with its path below the root."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def definitions(self, kinds: tuple[type, ...]) -> Iterator[tuple[str, int]]:
        """Every class or function: its place and its lines."""
        for node in ast.walk(self.tree):
            if isinstance(node, kinds):
                yield f"{self.path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1

    def docstrings(self) -> Iterator[tuple[str, str]]:
        """Names and texts of the docstrings of modules, classes, functions and attributes."""
        named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | named) and (text := ast.get_docstring(node)):
                yield getattr(node, "name", "module"), text
            if isinstance(node, ast.Module | ast.ClassDef):
                for target, value in pairwise(node.body):
                    if isinstance(target, ast.Assign | ast.AnnAssign) and _is_text(value):
                        name = target.targets[0] if isinstance(target, ast.Assign) else target.target
                        yield ast.unparse(name), value.value.value

    def prose(self) -> Iterator[tuple[int, str]]:
        """Comments, docstrings and messages, each with its line."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], token.string

    def comments(self) -> Iterator[tuple[int, str]]:
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class House:
    """The repository at ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def files(self) -> dict[str, list[File]]:
        """The source files of each folder, in order of their paths."""
        return {
            folder: [
                File(str(path.relative_to(self.root)), path.read_text())
                for path in sorted((self.root / folder).rglob("*.py"))
            ]
            for folder in FOLDERS
        }

    def packaged(self) -> list[File]:
        return [file for package in PACKAGES for file in self.files[package]]

    @cached_property
    def imports(self) -> Graph:
        """The modules that each module of packages and jobs imports, of the same."""
        modules = {file.module: file for folder in (*PACKAGES, "jobs") for file in self.files[folder]}
        return {name: set(_imported(file, modules)) - {name} for name, file in modules.items()}

    def rooms(self, package: str) -> Graph:
        """The rooms of a package, and which rooms each imports; a package's own ``__init__`` is none."""
        graph: dict[str, set[str]] = {}
        for module, imported in self.imports.items():
            if module.startswith(f"{package}."):
                room = module.split(".")[1]
                others = {name.split(".")[1] for name in imported if name.startswith(f"{package}.")}
                graph.setdefault(room, set()).update(others - {room})
        return graph

    def users_of_shared(self) -> dict[str, set[str]]:
        """The rooms that need each file of `pipelines.shared`, directly or through its other files.

        A room here is a room of `pipelines`, ``serve``, or one file of ``jobs``.
        """
        users: dict[str, set[str]] = {
            name: set() for name in self.imports if name.startswith("pipelines.shared.")
        }
        inside = {name: self.imports[name] & users.keys() for name in users}
        for module, imported in self.imports.items():
            parts = module.split(".")
            room = parts[0] if parts[0] == "serve" else ".".join(parts[:2])
            if room != "pipelines.shared":
                for name in imported & users.keys():
                    for needed in {name, *_reachable(inside, name)}:
                        users[needed].add(room)
        return users

    def median(self, package: str | None = None) -> float:
        """The median lines of files, those of ``__init__.py`` left out."""
        files = self.packaged() if package is None else self.files[package]
        return statistics.median(file.lines for file in files if not file.path.endswith("__init__.py"))

    def longest(self, kinds: tuple[type, ...]) -> list[tuple[int, str]]:
        """Lines and places of classes or functions, the longest first."""
        found = [(lines, place) for file in self.packaged() for place, lines in file.definitions(kinds)]
        return sorted(found, reverse=True)

    def unnamed_modules(self) -> dict[str, list[str]]:
        """The modules and folders of each room that the docstring of its ``__init__`` does not name."""
        unnamed = {}
        for file in self.packaged():
            room = (self.root / file.path).parent
            if file.path.endswith("/__init__.py") and room.parent != self.root:
                parts = [
                    path.stem
                    for path in sorted(room.iterdir())
                    if (path.suffix == ".py" and path != self.root / file.path)
                    or (path / "__init__.py").exists()
                ]
                text = ast.get_docstring(file.tree) or ""
                unnamed[str(room.relative_to(self.root))] = [
                    part for part in parts if not re.search(rf"`{part}[`.]", text)
                ]
        return {room: names for room, names in unnamed.items() if names}

    def short_docstrings(self, words: int = 4) -> list[str]:
        """Docstrings of few words outside of tests, as ``path::name: text``."""
        return [
            f"{file.path}::{name}: {text}"
            for folder in FOLDERS
            if folder != "tests"
            for file in self.files[folder]
            for name, text in file.docstrings()
            if len(text.split()) <= words
        ]

    def words(self) -> list[str]:
        """Uses of `WORDS` in sources, pages and `others`, as ``path:line: word: text``."""
        found = []
        for folder in FOLDERS:
            for file in self.files[folder]:
                prose = file.comments() if folder == "tests" else file.prose()
                found += [line for number, text in prose for line in _uses(file.path, number, text)]
        for path in pages(self.root):
            lines = enumerate(markdown_prose(path.read_text()).splitlines(), start=1)
            name = str(path.relative_to(self.root))
            found += [line for number, text in lines for line in _uses(name, number, text)]
        for path in others(self.root):
            lines = enumerate(path.read_text().splitlines(), start=1)
            name = str(path.relative_to(self.root))
            found += [line for number, text in lines for line in _uses(name, number, text)]
        return [use for use in found if not use.startswith("tests/house.py")]


def _imported(file: File, modules: Mapping[str, File]) -> Iterator[str]:
    """The modules, of these, that a file imports."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                elif node.module in modules:
                    yield node.module


def _uses(path: str, line: int, text: str) -> Iterator[str]:
    text = re.sub(r"``?[^`]*``?", "", text)  # names of code
    for word, pattern in WORDS.items():
        for found in re.finditer(pattern, text, flags=re.IGNORECASE):
            at = line + text[: found.start()].count("\n")
            context = " ".join(text[max(0, found.start() - 40) : found.end() + 40].split())
            yield f"{path}:{at}: {word}: … {context} …"


def pages(root: Path) -> list[Path]:
    return sorted(
        path for pattern in ("*.md", "docs/**/*.md", "models/**/*.md") for path in root.glob(pattern)
    )


def others(root: Path) -> list[Path]:
    """The files that are neither Python nor pages: scripts, web pages, manifests and settings."""
    patterns = [
        f"{folder}/**/*{suffix}"
        for folder in ("apps", "docs", "infra", "jobs", "serve")
        for suffix in SUFFIXES
    ]
    return sorted(
        path
        for pattern in ("Makefile", "*.toml", ".ci/*", "infra/**/Dockerfile", *patterns)
        for path in root.glob(pattern)
        if path.is_file()
    )


def markdown_prose(text: str) -> str:
    """A page without its generated parts and its code, each line in its place."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found.group().count("\n")

    text = re.sub(r"<!-- generated: .*?<!-- end: ", blank, text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", blank, text, flags=re.DOTALL)
    return re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)


def rendered_words(text: str, *, tables: bool = False) -> int:
    """The words that a reader of a page sees, without its code, without its tables unless ``tables``."""
    text = re.sub(r"<!--.*?-->", "", markdown_prose(text), flags=re.DOTALL)
    if not tables:
        text = re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def cycles(graph: Graph) -> list[set[str]]:
    """The sets of nodes that import each other, directly or not."""
    reach = {node: _reachable(graph, node) for node in graph}
    found = []
    for node in graph:
        together = {other for other in reach[node] if node in reach.get(other, ())}
        if node in together and together not in found:
            found.append(together)
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def layers(graph: Graph) -> int:
    """The nodes of the longest chain of imports; nodes of one cycle share a layer."""
    merged = {node: node for node in graph}
    for cycle in cycles(graph):
        merged |= dict.fromkeys(cycle, min(cycle))
    condensed: dict[str, set[str]] = defaultdict(set)
    for node, imported in graph.items():
        condensed[merged[node]] |= {merged[other] for other in imported if other in merged} - {merged[node]}
    depth: dict[str, int] = {}
    for node in TopologicalSorter(condensed).static_order():
        depth[node] = 1 + max((depth[other] for other in condensed[node]), default=0)
    return max(depth.values(), default=0)


def report(house: House) -> str:
    """The numbers of docs/LOG.md as a table."""
    lines = ["| | " + " | ".join(PACKAGES) + " |", "| --- |" + " ---: |" * len(PACKAGES)]

    def row(name: str, values: Iterator[object]) -> None:
        lines.append(f"| {name} | {' | '.join(map(str, values))} |")

    rooms = {package: house.rooms(package) for package in PACKAGES}
    row("files", (len(house.files[package]) for package in PACKAGES))
    row("rooms", (len(rooms[package]) for package in PACKAGES))
    row("imports between rooms", (sum(map(len, rooms[package].values())) for package in PACKAGES))
    row("layers of rooms", (layers(rooms[package]) for package in PACKAGES))
    row("cycles of rooms", (len(cycles(rooms[package])) for package in PACKAGES))
    row("median lines of a file", (f"{house.median(package):g}" for package in PACKAGES))
    files = sorted(((file.lines, file.path) for file in house.packaged()), reverse=True)
    readme = (house.root / "README.md").read_text()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lines += [
        "",
        f"cycles of files: {len(cycles(house.imports))}",
        f"median lines of a file, overall: {house.median():g}",
        f"longest file: {files[0]}",
        f"longest class: {house.longest((ast.ClassDef,))[0]}",
        f"longest function: {house.longest(functions)[0]}",
        f"words of the README, without code and tables: {rendered_words(readme)}",
        f"words of the README, without code: {rendered_words(readme, tables=True)}",
        f"words of the README, in the file: {len(readme.split())}",
        f"docstrings of four words or fewer: {len(house.short_docstrings())}",
        f"words to avoid: {len(house.words())}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository to measure")
    parser.add_argument("--lists", action="store_true", help="also list docstrings, words, files to shorten")
    options = parser.parse_args()
    house = House(options.root)
    print(report(house))
    if options.lists:
        print("\nfiles over 400 lines:", *(f"{f.path} {f.lines}" for f in house.packaged() if f.lines > 400))
        print("\nclasses over 300 lines:", *(p for p in house.longest((ast.ClassDef,)) if p[0] > 300))
        print("\nfew users:", {k: sorted(v) for k, v in house.users_of_shared().items() if len(v) < 3})
        print("\ncycles:", *cycles(house.imports), sep="\n")
        print("\ndocstrings:", *house.short_docstrings(), sep="\n")
        print("\nwords:", *house.words(), sep="\n")


if __name__ == "__main__":
    main()
