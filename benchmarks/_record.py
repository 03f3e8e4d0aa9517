"""The record of a run: a generated part of a Markdown page, and the same as JSON.

A part has the command, the conditions and the tables, between two markers:

    <!-- generated: NAME -->
    `python -m benchmarks run …`

    2026-11-29; AMD EPYC, 2 cores, 2 threads; Python 3.11.7, torch 2.13.0; …; load average 1.4 before, ….

    ### Title

    | setting | ms: median (min – max) |
    …
    <!-- end: NAME -->

`write_part` writes it, and writes the records of all parts of the page to a JSON file of the same name. Both
have the same numbers, because `read_page` reads the JSON from the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""Keys: command, date, machine, versions, load, conditions, notes, tables."""

_PART = re.compile(r"<!-- generated: (\S+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)
_CONDITIONS = re.compile(r"^\d{4}-\d\d-\d\d; .*", re.MULTILINE)
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_CELL = re.compile(
    rf"(?P<value>{_NUMBER})(?P<percent>%?)(?: \((?P<low>{_NUMBER})%? – (?P<high>{_NUMBER})%?\))?"
)


def today() -> str:
    """Return the date in UTC."""
    return datetime.now(UTC).date().isoformat()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; all columns except the first are right-aligned."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_part(file: Path, part: str, text: str) -> None:
    """Replace the generated part of a page, and write the records of all its parts to JSON.

    A page without text of its own receives a new part at its end. Another page must have the part's markers.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_with_part(file, part, text))
    write_records(file)


def _with_part(file: Path, part: str, text: str) -> str:
    begin, end = f"<!-- generated: {part} -->", f"<!-- end: {part} -->"
    page = file.read_text() if file.exists() else ""
    if begin not in page and not _PART.sub("", page).strip():
        page = f"{page}{begin}\n{end}\n"
    if begin not in page or end not in page:
        raise SystemExit(f"{file} has no markers {begin} and {end}: add them where the part belongs")
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def write_records(page: Path) -> Path | None:
    """Write the records of a page to a JSON file of the same name; returns it, or None without records."""
    records = read_page(page.read_text())
    if not records:
        return None
    file = page.with_suffix(".json")
    file.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return file


def read_page(page: str) -> dict[str, Record]:
    """Read the records of a page by the names of their parts. Parts that are no run have none."""
    return {name: _record(text) for name, text in _PART.findall(page) if _CONDITIONS.search(text)}


def _record(text: str) -> Record:
    command = re.search(r"^(?:```text\n|`)(.*?)`", text, flags=re.DOTALL | re.MULTILINE)
    date, machine, *others = _CONDITIONS.findall(text)[0].rstrip(".").split("; ")
    versions = [other for other in others if other.startswith("Python ")]
    loads = [other for other in others if other.startswith("load average ")]
    return {
        "command": command[1].strip() if command else "",
        "date": date,
        "machine": machine,
        "versions": versions or re.findall(r"^- (\w+: Python .*)$", text, flags=re.MULTILINE),
        "load": ", ".join(loads).removeprefix("load average "),
        "conditions": [other for other in others if other not in (*versions, *loads)],
        "notes": [
            line for line in text.splitlines() if line[:1].isalpha() and not line.startswith("python ")
        ],
        "tables": list(tables_of(text)),
    }


def tables_of(text: str) -> Iterator[dict[str, Any]]:
    """Yield each table of a Markdown text: its title, which is the last heading before it, and its rows."""
    title, head = "", None
    rows: list[dict[str, Any]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if head is None:
                head, rows = cells, []
            elif not set(line) <= set("|-: "):
                rows.append(dict(zip(head, map(_value, cells), strict=True)))
        elif head is not None:
            yield {"title": title, "rows": rows}
            head = None


def _value(cell: str) -> Any:
    """Read a cell: text, a number, None for a dash, or median, low and high; shares are fractions."""
    if cell == "–":
        return None
    found = _CELL.fullmatch(cell.replace("*", ""))
    if found is None:
        return cell
    scale = 0.01 if found["percent"] else 1

    def number(text: str) -> float:
        return round(scale * float(text.replace(",", "")), 9)

    if found["low"] is None:
        return number(found["value"])
    return {"median": number(found["value"]), "low": number(found["low"]), "high": number(found["high"])}
