"""Tables of questions as VLMEvalKit keeps them: tab-separated values with base64 images in them.

Columns that mean something here; all others are passed on as they are:

``index``       names the row
``image``       base64; a list of it, as Python or JSON write one; or the index of the row whose image it is
``image_path``  where there is no column ``image``: a path, or a list of paths
``question``, ``hint``, ``A`` … ``Z``    what is asked, and the options to choose from

Images stay in the file; a row refers to their place in it.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

import fsspec

from pipelines.data.images import TsvImage
from pipelines.data.instructions import instructed
from pipelines.data.literals import literal
from pipelines.data.records import Record
from pipelines.data.rows import IMAGE_PLACEHOLDER
from skipvision.errors import DataError

IMAGE_DIGEST = "image_digest"
"""A column that every row gets: equal where the images are."""

_LONGEST_INDEX = 64
_BOM = b"\xef\xbb\xbf"
_LISTED = re.compile(rb"[^\[\]\"', ]+")
_UNCLOSED = (
    "{file}: the quote that begins a cell in line {opened} {what}. A quote that belongs to the text is "
    "written twice, and the whole cell in quotes"
)
_NUMBERED_IMAGE = re.compile(r"<image (\d+)>")


def tsv_records(file: str, name: str, images: Sequence[str], max_pixels: int) -> Iterator[Record]:
    """The rows of one table, in its order; needs the memory of all its texts, but not of its images.

    Args:
        file: absolute path or URL.
        name: what rows without an index are called, with their number.
        images: names the column of images may have; the first that is there counts.
        max_pixels: of an image; one with more is an error when it is opened.

    Raises:
        DataError: the file is empty, has two columns of one name, or a quote in it is not closed.
    """
    with fsspec.open(file, "rb") as stream:
        rows = list(_rows(file, stream, images))
    held = {row.index: row for row in rows if row.images}
    for number, row in enumerate(rows, start=1):
        record = partial(Record, file, f"row {number}", f"{name}-{number}")
        try:
            yield record(_value(file, row, held, max_pixels))
        except ValueError as error:
            known = {row.image_column: []} if row.image_column else {}
            yield record({**row.texts, **known}, str(error))


# --------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Row:
    """A row whose images are places in the file; ``image`` is the cell's text where it is short."""

    texts: dict[str, Any]
    image_column: str | None
    image: str
    images: tuple[tuple[int, int], ...]
    digest: str
    problem: str = ""

    @property
    def index(self) -> str:
        return str(self.texts.get("index", ""))


def _rows(file: str, stream: IO[bytes], images: Sequence[str]) -> Iterator[_Row]:
    lines = _lines(file, stream)
    header = next(lines, None)
    if header is None:
        raise DataError(f"{file} is empty")
    names = [cell.text for cell in header]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{file} has several columns of the name {repeated[0]!r}")
    image = next((column for column in images if column in names), None)
    for cells in lines:
        yield _row(names, cells, image)


def _row(names: Sequence[str], cells: Sequence[_Cell], image: str | None) -> _Row:
    """A row; one that is broken keeps its texts as far as they go."""
    problem = ""
    if len(cells) != len(names):
        problem = f"the row has {len(cells)} fields, the header {len(names)}"
    texts: dict[str, Any] = {name: "" for name in names if name != image}
    held = _Cell(0, b"")
    for name, cell in zip(names, cells, strict=False):
        if name == image:
            held = cell
            continue
        try:
            texts[name] = cell.text
        except UnicodeDecodeError as error:
            problem = f"column `{name}` is not valid UTF-8: {error}"
    short = len(held.raw) <= _LONGEST_INDEX
    if not problem and short and not held.raw.isascii():
        problem = f"column `{image}` is neither base64 nor the index of another row"
    return _Row(
        texts,
        image,
        held.raw.decode("ascii", "replace").strip() if short else "",
        () if short else tuple(_places(held)),
        "" if short else hashlib.blake2b(held.raw, digest_size=8).hexdigest(),
        problem,
    )


def _places(cell: _Cell) -> Iterator[tuple[int, int]]:
    """Where each image of a cell begins, and how many bytes it has."""
    if not cell.raw.lstrip().startswith(b"["):
        yield cell.offset, len(cell.raw)
        return
    for found in _LISTED.finditer(cell.raw):
        yield cell.offset + found.start(), found.end() - found.start()


def _value(file: str, row: _Row, held: Mapping[str, _Row], max_pixels: int) -> dict[str, Any]:
    """The record's columns; raises `ValueError` where the row is broken."""
    if row.problem:
        raise ValueError(row.problem)
    value = dict(row.texts)
    images: list[Any] = []
    if row.image_column is None:
        images = _listed(value.get("image_path", ""))
        value[IMAGE_DIGEST] = " ".join(images)
    elif row.image or row.images:
        holder = row if row.images else held.get(row.image)
        if holder is None:
            raise ValueError(
                f"column `{row.image_column}` is {row.image!r}: neither base64 nor the index of a row"
            )
        images = [
            TsvImage(file, f"#{number} of row {row.index}", offset, size, max_pixels)
            for number, (offset, size) in enumerate(holder.images, start=1)
        ]
        value[IMAGE_DIGEST] = holder.digest
    if "question" in value:
        whole, images = _numbered(_whole_question(value), images)
        value |= instructed(whole, bool(options(value)))
    if row.image_column or images:
        value[row.image_column or "image"] = images
    return value


def _listed(text: str) -> list[str]:
    """One text, or those of a list."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        values = literal(text)
    except ValueError as error:
        raise ValueError(f"column `image_path` is no path and no list of paths, but {error}") from None
    return [str(value) for value in values] if isinstance(values, list) else [text]


# ---------------------------------------------------------------------------------------- questions


def options(row: Mapping[str, str]) -> dict[str, str]:
    """The options of a row by their letters; empty cells are none."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


def _whole_question(row: Mapping[str, str]) -> str:
    lines = [f"Hint: {row['hint']}"] if row.get("hint") else []
    lines.append(row["question"])
    lines += [f"{letter}. {text}" for letter, text in options(row).items()]
    return "\n".join(lines)


def _numbered(text: str, images: list[Any]) -> tuple[str, list[Any]]:
    """``<image 2>`` in a text becomes a placeholder; images in the order in which they are named.

    A text that names none is asked about all of them.
    """
    numbers = [int(number) for number in _NUMBERED_IMAGE.findall(text)]
    if not numbers:
        return text.replace(IMAGE_PLACEHOLDER, "image"), images
    unknown = [number for number in numbers if not 1 <= number <= len(images)]
    if unknown:
        raise ValueError(f"the question names <image {unknown[0]}>, but the row has {len(images)}")
    plain = text.replace(IMAGE_PLACEHOLDER, "image")
    return _NUMBERED_IMAGE.sub(IMAGE_PLACEHOLDER, plain), [images[number - 1] for number in numbers]


# -------------------------------------------------------------------------------------------- cells


class _Cell(NamedTuple):
    """A cell: where its content begins in the file, and the content, in which quotes may be doubled."""

    offset: int
    raw: bytes
    quoted: bool = False

    @property
    def text(self) -> str:
        return (self.raw.replace(b'""', b'"') if self.quoted else self.raw).decode()


def _lines(file: str, stream: IO[bytes]) -> Iterator[list[_Cell]]:
    """The rows of a table, header first; a quoted cell may hold tabs and line ends. Empty lines are none."""
    lines = enumerate(stream, start=1)
    start = 0
    for number, line in lines:
        if start == 0 and line.startswith(_BOM):
            start, line = len(_BOM), line.removeprefix(_BOM)
        cells: list[_Cell] = []
        at = 0
        while at <= len(line):
            if line[at : at + 1] == b'"':
                number, line, end = _closed(file, lines, number, line, at + 1)
                cells.append(_Cell(start + at + 1, line[at + 1 : end], quoted=True))
                at = end + 1 if line[end + 1 : end + 2] == b"\t" else -1
            else:
                end = line.find(b"\t", at)
                content = line[at:] if end < 0 else line[at:end]
                cells.append(_Cell(start + at, content.rstrip(b"\r\n") if end < 0 else content))
                at = end
            if at < 0:
                break
            at += 1
        start += len(line)
        if line.strip():
            yield cells


def _closed(
    file: str, lines: Iterator[tuple[int, bytes]], number: int, line: bytes, at: int
) -> tuple[int, bytes, int]:
    """Read on until the cell whose text begins at ``at`` is closed.

    Returns:
        The number of the last line read, all lines as one, and the place of the closing quote.

    Raises:
        DataError: no quote closes the cell, or text follows the one that does.
    """
    opened, held, before = number, [line], 0
    while (end := _closing_quote(held[-1], at)) < 0:
        before, at = before + len(held[-1]), 0
        number, more = next(lines, (number, b""))
        if not more:
            raise DataError(_UNCLOSED.format(file=file, opened=opened, what="is never closed"))
        held.append(more)
    if held[-1][end + 1 : end + 2] not in (b"\t", b"\r", b"\n", b""):
        what = f"is closed in line {number}, where text follows"
        raise DataError(_UNCLOSED.format(file=file, opened=opened, what=what))
    return number, b"".join(held), before + end


def _closing_quote(line: bytes, at: int) -> int:
    while (end := line.find(b'"', at)) >= 0 and line[end + 1 : end + 2] == b'"':
        at = end + 2
    return end
