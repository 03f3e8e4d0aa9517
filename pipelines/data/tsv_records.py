"""Read VLMEvalKit's tables of questions: tab-separated values with base64 images.

These columns have a meaning; all others are passed on unchanged:

``index``       the row's key
``image``       base64; a Python or JSON list of base64; or the index of another row with the same image
``image_path``  a path or a list of paths, if there is no column ``image``
``question``, ``hint``, ``A`` … ``Z``    the question and its options

Images stay in the file; a row refers to their position in it.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, NamedTuple

from pipelines.data.formats import rows_of
from pipelines.data.images import TsvImage
from pipelines.data.instructions import instructed
from pipelines.data.literals import literal
from pipelines.data.records import Record
from pipelines.data.rows import IMAGE_PLACEHOLDER
from skipvision.errors import DataError

IMAGE_DIGEST = "image_digest"
"""Column added to every row: equal for equal images."""

_LONGEST_INDEX = 64
_BOM = b"\xef\xbb\xbf"
_LISTED = re.compile(rb"(?:data:[^,\"']*,)?[A-Za-z0-9+/][^\[\]\"',]*", re.IGNORECASE)
_UNCLOSED = (
    "{file}: the quote that begins a cell in line {opened} {problem}. To use a quote in a text, double it "
    "and put the whole cell in quotes"
)
_NUMBERED_IMAGE = re.compile(r"<image (\d+)>")


def tsv_records(file: str, name: str, images: Sequence[str], max_pixels: int) -> Iterator[Record]:
    """Yield the rows of one table, in its order. All texts are held in memory, the images are not.

    Args:
        file: absolute path or URL.
        name: with the row's number, the key of a row without an index.
        images: possible names of the image column; the first that exists is used.
        max_pixels: max pixels of an image, checked when it is opened.

    Raises:
        DataError: the file is empty, repeats a column name, or has an unclosed quote.
    """
    with rows_of(file) as stream:
        rows = list(_rows(file, stream, images))
    held = {row.index: row for row in rows if row.images}
    for number, row in enumerate(rows, start=1):
        record = partial(Record, file, f"row {number}", f"{name}-{number}")
        try:
            yield record(_value(file, row, held, max_pixels))
        except ValueError as error:
            known: dict[str, list[Any]] = {row.image_column: []} if row.image_column else {}
            yield record({**row.texts, **known}, str(error))


# --------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Row:
    """A row with (offset, size) of each image; ``image`` is the text of the image cell if it is short."""

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
        raise DataError(f"{file} has several columns named {repeated[0]!r}; rename all but one")
    image = next((column for column in images if column in names), None)
    for cells in lines:
        yield _row(names, cells, image)


def _row(names: Sequence[str], cells: Sequence[_Cell], image: str | None) -> _Row:
    """Return a row. A broken one keeps the texts that could be read."""
    problem = ""
    if len(cells) != len(names):
        problem = f"the row has {len(cells)} fields, but the header has {len(names)}"
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
    """Yield the offset and the size (bytes) of each image in a cell."""
    if not cell.raw.lstrip().startswith(b"["):
        yield cell.offset, len(cell.raw)
        return
    for found in _LISTED.finditer(cell.raw):
        yield cell.offset + found.start(), found.end() - found.start()


def _value(file: str, row: _Row, held: Mapping[str, _Row], max_pixels: int) -> dict[str, Any]:
    """Return the record's columns. Raise `ValueError` if the row is broken."""
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
    """Return the text, or the texts in a list."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        values = literal(text)
    except ValueError as error:
        raise ValueError(f"column `image_path` is neither a path nor a list of paths: {error}") from None
    return [str(value) for value in values] if isinstance(values, list) else [text]


# ---------------------------------------------------------------------------------------- questions


def options(row: Mapping[str, str]) -> dict[str, str]:
    """Return the options of a row by letter, without empty ones."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


def _whole_question(row: Mapping[str, str]) -> str:
    lines = [f"Hint: {row['hint']}"] if row.get("hint") else []
    lines.append(row["question"])
    lines += [f"{letter}. {text}" for letter, text in options(row).items()]
    return "\n".join(lines)


def _numbered(text: str, images: list[Any]) -> tuple[str, list[Any]]:
    """Replace ``<image 2>`` by a placeholder and return the images in the order of their placeholders.

    A text without numbered images refers to all images.
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
    """A cell: the offset of its content in the file, and the content, in which quotes may be doubled."""

    offset: int
    raw: bytes
    quoted: bool = False

    @property
    def text(self) -> str:
        return (self.raw.replace(b'""', b'"') if self.quoted else self.raw).decode()


def _lines(file: str, stream: IO[bytes]) -> Iterator[list[_Cell]]:
    """Yield the lines of a table, header first, without empty ones. Quoted cells may hold line ends."""
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
    """Read lines until the quoted cell that begins at ``at`` is closed.

    Returns:
        The number of the last line read, all these lines joined, and the position of the closing quote.

    Raises:
        DataError: no quote closes the cell, or text follows the closing quote.
    """
    opened, held, before = number, [line], 0
    while (end := _closing_quote(held[-1], at)) < 0:
        before, at = before + len(held[-1]), 0
        number, more = next(lines, (number, b""))
        if not more:
            raise DataError(_UNCLOSED.format(file=file, opened=opened, problem="is never closed"))
        held.append(more)
    if held[-1][end + 1 : end + 2] not in (b"\t", b"\r", b"\n", b""):
        problem = f"is closed in line {number}, but text follows it"
        raise DataError(_UNCLOSED.format(file=file, opened=opened, problem=problem))
    return number, b"".join(held), before + end


def _closing_quote(line: bytes, at: int) -> int:
    while (end := line.find(b'"', at)) >= 0 and line[end + 1 : end + 2] == b'"':
        at = end + 2
    return end
