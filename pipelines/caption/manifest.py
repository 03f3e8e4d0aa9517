"""The manifest: a list of every row of the inputs, divided into shards.

It is one parquet file whose row groups are the shards. The job writes it at its first start and reads it at
every later start, even if files were added to the inputs since. Its keys are unique: a row with the key of an
earlier row is named ``key#2`` and so on, and becomes an error row.
"""

from __future__ import annotations

import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.caption.config import InputSection
from pipelines.caption.rows import MANIFEST_SCHEMA, CaptionRow, Problem, manifest_rows, manifest_table
from pipelines.data.conversations import listed_images, parse_image
from pipelines.data.prompts import CONVERSATION_COLUMNS, PromptTemplate, prompt_messages
from pipelines.data.records import Record
from pipelines.data.rows import BadRow
from pipelines.data.sources import Wanted, read_inputs
from pipelines.data.storage import absolute
from pipelines.shared.files import atomic, cause_and_remedy
from skipvision.errors import ConfigError, DataError

_FIRST_ROWS = 256
"""Every column in the settings must occur in some of this many first rows."""
_REPORT_EVERY = 100_000


@dataclass(frozen=True)
class ManifestFacts:
    """The number of rows, of rows with a problem by kind, and of skipped files by suffix."""

    rows: int
    problems: Mapping[str, int]
    passed_over: Mapping[str, int]


class Manifest:
    """The rows of a job, read from its folder of manifest shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = pq.read_metadata(path)
        self.rows: int = metadata.num_rows
        self.shard_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    @property
    def shards(self) -> int:
        return len(self.shard_rows)

    def shard(self, number: int, max_pixels: int) -> list[CaptionRow]:
        """Return the rows of one shard."""
        with pq.ParquetFile(self.path) as file:
            return manifest_rows(file.read_row_group(number), max_pixels)


def write_manifest(
    settings: InputSection, path: Path, shard_rows: int, say: Callable[[str], None] = print
) -> ManifestFacts:
    """List all inputs in the file ``path``, which appears when it is complete.

    This needs memory for one shard, and eight bytes per row.

    Raises:
        ConfigError: no row has the column of the prompt, the key or the images.
        DataError: a file cannot be read at all, or there are no rows.
        StorageError: the manifest cannot be written.
    """
    listing = _Listing(settings)
    hashes = array("q")
    problems: Counter[str] = Counter()

    def counted(rows: Iterable[CaptionRow]) -> Iterator[CaptionRow]:
        for number, row in enumerate(rows, start=1):
            hashes.append(hash(row.key))
            if row.problem:
                problems[row.problem.kind] += 1
            if number % _REPORT_EVERY == 0:
                say(f"{number:,} rows listed")
            yield row

    rows = _errors_of_inputs(listing.rows(), settings.source)
    if settings.keys is not None:
        keys = frozenset(Path(settings.keys).read_text(encoding="utf-8").splitlines())
        rows = (row for row in rows if row.key in keys)
    with atomic(path) as partial:
        _write(partial, counted(islice(rows, settings.limit)), shard_rows)
        if not hashes:
            raise DataError(f"input.source = {settings.source}: there is nothing to caption{listing.hint()}")
        repeated = _Repeated(np.frombuffer(hashes, np.int64))
        if repeated.hashes.size:
            again = partial.with_name(f"{partial.name}-again")
            manifest = Manifest(partial)
            rows = chain.from_iterable(manifest.shard(i, settings.max_pixels) for i in range(manifest.shards))
            _write(again, repeated.renamed(rows), shard_rows)
            again.replace(partial)
            if repeated.without_problem:
                problems["duplicate key"] = repeated.without_problem
    return ManifestFacts(len(hashes), dict(problems.most_common()), dict(listing.passed_over))


def _errors_of_inputs(rows: Iterator[CaptionRow], source: str) -> Iterator[CaptionRow]:
    """Yield the rows; an `OSError` while they are read is about the inputs, and not about the manifest."""
    try:
        yield from rows
    except OSError as error:
        name = source if error.filename is None else os.fsdecode(error.filename)
        raise DataError(f"input.source: {name} cannot be read: {cause_and_remedy(error)}") from error


def _write(path: Path, rows: Iterable[CaptionRow], shard_rows: int) -> None:
    rows = iter(rows)
    with pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd") as writer:
        while shard := list(islice(rows, shard_rows)):
            writer.write_table(manifest_table(shard), row_group_size=shard_rows)


# --------------------------------------------------------------------------------------------- rows


class _Listing:
    """Converts records of the inputs to rows of the manifest."""

    def __init__(self, settings: InputSection) -> None:
        self.settings = settings
        self.template = None if settings.prompt is None else PromptTemplate(settings.prompt)
        self.images = ("image", "images") if settings.image is None else (settings.image,)
        columns = {settings.key or "id", *self.images}
        columns |= set(CONVERSATION_COLUMNS if self.template is None else self.template.columns)
        wanted = Wanted(frozenset(columns), self.images, settings.max_pixels)
        self.records, self.passed_over = read_inputs(settings.source, wanted)

    def rows(self) -> Iterator[CaptionRow]:
        first = list(islice(self.records, _FIRST_ROWS))
        self._check_columns([record.value for record in first if isinstance(record.value, dict)])
        return (_writable(self._row(record)) for record in chain(first, self.records))

    def hint(self) -> str:
        passed = ", ".join(f"{count} × {suffix or 'no suffix'}" for suffix, count in self.passed_over.items())
        return (
            f" (files skipped: {passed}; a pattern with * takes every file that it matches)" if passed else ""
        )

    def _check_columns(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise `ConfigError` for a column that none of the first rows has."""
        if not rows:
            return
        present = set().union(*rows)
        wanted = {"input.image": [self.settings.image] if self.settings.image else []}
        wanted["input.key"] = [self.settings.key] if self.settings.key else []
        wanted["input.prompt"] = list(self.template.columns) if self.template else []
        for field, columns in wanted.items():
            missing = [column for column in columns if column not in present]
            if missing:
                raise ConfigError(
                    f"{field} names column {missing[0]!r}, which no row of {self.settings.source} has; their "
                    f"columns are: {', '.join(sorted(map(str, present))) or 'none'}"
                )
        if self.template is None and not present & set(CONVERSATION_COLUMNS):
            raise ConfigError(
                f"input.prompt is null, but rows of {self.settings.source} have neither `conversations` nor "
                "`messages`: give a prompt"
            )

    def _row(self, record: Record) -> CaptionRow:
        key, source = record.fallback_key, ": ".join(filter(None, [record.file, record.place]))
        try:
            if record.problem or not isinstance(record.value, dict):
                what = f"the row is of type {type(record.value).__name__}, expected an object"
                raise BadRow("broken record", record.problem or what)
            key = self._key(record.value, key)
            images = self._images(record, key)
            messages = prompt_messages(record.value, len(images), self.template, self.settings.system)
            return CaptionRow(key, source, messages, images)
        except BadRow as problem:
            return CaptionRow(key, source, problem=Problem(problem.kind, problem.reason))

    def _key(self, value: Mapping[str, Any], fallback: str) -> str:
        given = value.get(self.settings.key or "id")
        if isinstance(given, str | int | float) and given != "":
            return str(given)
        if self.settings.key is not None:
            what = f"the key `{self.settings.key}` is {given!r}, expected text or a number"
            raise BadRow("broken record", what)
        return fallback

    def _images(self, record: Record, key: str) -> tuple[Any, ...]:
        value: Any = record.value
        if self.settings.image is not None:
            value = {"image": value.get(self.settings.image)}
        root = self.settings.image_root
        root = posixpath.dirname(record.file) if root is None else absolute(root)
        found = tuple(
            parse_image(image, f"#{number} of row {key}", root, self.settings.max_pixels)
            for number, image in enumerate(listed_images(value), start=1)
        )
        if not found:
            raise BadRow("missing image", "the row has no image")
        return found


def _writable(row: CaptionRow) -> CaptionRow:
    """Return the row, or a row with a problem if its text is not valid Unicode and cannot be written."""
    texts = [row.key, row.source, *(m.text for m in row.messages), *map(str, row.images)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        key, source = (text.encode(errors="backslashreplace").decode() for text in texts[:2])
        return CaptionRow(
            key, source, problem=Problem("broken record", "a text of the row is not valid Unicode")
        )
    return row


# -------------------------------------------------------------------------------------------- keys


class _Repeated:
    """Keys that occur more than once, found by their hashes, so that not all keys must be in memory."""

    def __init__(self, hashes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self.all = np.sort(hashes)
        self.hashes = np.unique(self.all[1:][self.all[1:] == self.all[:-1]])
        self.without_problem = 0
        self._first: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def renamed(self, rows: Iterable[CaptionRow]) -> Iterator[CaptionRow]:
        """Yield the rows. A row whose key was used before gets a new key and a problem."""
        for row in rows:
            if not _within(hash(row.key), self.hashes):
                yield row
            elif row.key not in self._first:
                self._first[row.key] = row.source
                yield row
            else:
                if row.problem is None:
                    self.without_problem += 1
                    reason = f"the key {row.key!r} is that of an earlier row ({self._first[row.key]})"
                    row = replace(row, problem=Problem("duplicate key", reason), messages=(), images=())
                yield replace(row, key=self._free(row.key))

    def _free(self, key: str) -> str:
        """Return the next of ``key#2``, ``key#3`` … that no row has as its own key."""
        while True:
            self._numbers[key] += 1
            name = f"{key}#{self._numbers[key] + 1}"
            if not _within(hash(name), self.all):
                return name


def _within(value: int, ordered: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
    at = int(np.searchsorted(ordered, value))
    return at < ordered.size and int(ordered[at]) == value
