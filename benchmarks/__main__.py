"""List the benchmarks, run one, or draw the figures.

python -m benchmarks list
python -m benchmarks run NAME [options]
python -m benchmarks figures
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks._registry import BENCHMARKS

RESULTS = Path("runs/benchmarks")
"""Folder of the results of a run without --out."""
PAGES = Path(__file__).parents[1] / "docs/benchmarks"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    options = _parser().parse_args(arguments)
    if options.command == "list":
        print(_listing())
    elif options.command == "run":
        _run(options.name, options.options)
    else:
        from benchmarks._figures import update

        for file in update(options.pages):
            print(file)


def _listing() -> str:
    """Describe every benchmark in three lines."""
    blocks = []
    for benchmark in BENCHMARKS:
        question = textwrap.fill(benchmark.question, 100, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{benchmark.name}\n{question}\n    {benchmark.duration}; {benchmark.needs}")
    return "\n".join(blocks)


def _run(name: str, options: list[str]) -> None:
    """Run a benchmark as its own module would run. Without --out its results go to `RESULTS`."""
    informs = any(word in ("-h", "--help") for word in options)
    if not informs and not any(word == "--out" or word.startswith("--out=") for word in options):
        options = [*options, "--out", str(RESULTS / f"{name}.md")]
    sys.argv = [f"python -m benchmarks run {name}", *options]
    importlib.import_module(f"benchmarks.{name}").main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="describe every benchmark: its question, duration and needs")
    run = commands.add_parser(
        "run", help="measure; writes Markdown and JSON to --out, or to runs/benchmarks/"
    )
    run.add_argument("name", choices=[benchmark.name for benchmark in BENCHMARKS], metavar="NAME")
    run.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="…", help="of the benchmark; --help lists them"
    )
    figures = commands.add_parser(
        "figures", help="draw figures and update the tables of a folder's README.md from the pages' results"
    )
    figures.add_argument("--pages", type=Path, default=PAGES, help="folder (default: docs/benchmarks)")
    return parser


if __name__ == "__main__":
    main()
