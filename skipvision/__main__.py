"""The library's command line: ``python -m skipvision`` with ``families``, ``overlay`` or ``size``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches

import transformers

from skipvision.analysis import overlay_command
from skipvision.cost import size_command
from skipvision.errors import SkipVisionError
from skipvision.testing.survey import EVERY, count, lines, markdown, survey


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the command that they name."""
    parser = argparse.ArgumentParser(prog="python -m skipvision", description="Skip-Vision's command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    families = commands.add_parser(
        "families",
        help="try every model family of the installed transformers and list which are supported",
        description="Try each image-text-to-text family of the installed transformers on a tiny random "
        "model. Print its properties if it is supported, and the reason if not. All families take a minute "
        "or two.",
    )
    families.add_argument("names", nargs="*", metavar="NAME", help="model_type of a family (default: all)")
    form = families.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a list of objects")
    form.add_argument("--markdown", action="store_true", help="print the tables of docs/families.md")
    overlay = commands.add_parser(
        "overlay",
        help="draw which patches of an image are retained, skipped, merged and dropped",
        description="Run an image through a model with Skip-Vision and draw what becomes of its patches. "
        "Merged patches have the colour of the patch they are merged into, and a line to it.",
    )
    try:
        overlay_command.add_options(overlay)
    except SkipVisionError as error:  # raised by a module of methods
        parser.exit(2, f"{parser.prog}: {error}\n")
    size = commands.add_parser(
        "size",
        help="estimate GPUs, memory, storage and cost for a number of images a day",
        description="Estimate what a number of images a day needs, with full tokens and with Skip-Vision, "
        "from the model's config alone.",
    )
    size_command.add_options(size)
    options = parser.parse_args(arguments)
    if options.command == "overlay":
        _run(overlay_command.run, overlay, options)
        return
    if options.command == "size":
        _run(size_command.run, size, options)
        return
    unknown = [name for name in options.names if name not in EVERY]
    if unknown:
        families.error("; ".join(map(_no_such_family, unknown)))
    _families(options.names or EVERY, options.json, options.markdown)


def _no_such_family(name: str) -> str:
    close = get_close_matches(name, EVERY)
    near = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(EVERY)}"
    return f"no family {name!r} in transformers {transformers.__version__}: {near}"


def _run(
    command: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        command(options)
    except SkipVisionError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")  # without usage: the options were understood


def _families(names: Sequence[str], as_json: bool, as_markdown: bool) -> None:
    transformers.logging.set_verbosity_error()
    findings = []
    for number, name in enumerate(names, start=1):
        print(f"{number}/{len(names)} {name}", file=sys.stderr)
        findings.append(survey(name))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    elif as_markdown:
        print(markdown(findings), end="")
    else:
        print(*lines(findings), f"{count(findings)}.", sep="\n")


if __name__ == "__main__":
    main()
