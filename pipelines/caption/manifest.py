"""The manifest: a list of every row of the inputs, divided into shards.

It is a folder of parquet files whose row groups are the shards. The job writes it at its first start and
reads it at every later start, even if files were added to the inputs since. Its keys are unique: a row with
the key of an earlier row is named ``key#2`` and so on, and becomes an error row.

::

    manifest/000000.parquet …    the rows of `_PART_SHARDS` shards each
             index.json          number of rows, rows of a shard, shards of a file
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.caption.config import InputSection
from pipelines.caption.keys import KeyHashes, RepeatedKeys
from pipelines.caption.rows import MANIFEST_SCHEMA, CaptionRow, Problem, manifest_rows, manifest_table
from pipelines.data.conversations import listed_images, parse_image
from pipelines.data.prompts import PromptTemplate, prompt_messages
from pipelines.data.records import Record
from pipelines.data.rows import BadRow
from pipelines.data.sources import Wanted, read_inputs
from pipelines.data.storage import absolute
from pipelines.data.turns import CONVERSATION_COLUMNS, NO_CONVERSATION, has_conversation
from pipelines.shared.files import atomic_folder, cause_and_remedy, read_setting
from skipvision.errors import ConfigError, DataError

_FIRST_ROWS = 256
"""Every column in the settings must occur in some of this many first rows."""
_REPORT_EVERY = 100_000
_UNDECODED = re.compile("[\udc80-\udcff]")
"""Characters that Python puts in place of the bytes of a file name that is not UTF-8."""
_PART_SHARDS = 100
"""Shards in a file. Reading one shard also reads the metadata of all shards in its file, 2 KB each."""


@dataclass(frozen=True)
class ManifestFacts:
    """The number of rows, of rows with a problem by kind, and of skipped files by suffix."""

    rows: int
    problems: Mapping[str, int]
    passed_over: Mapping[str, int]


class Manifest:
    """The rows of a job, read from its manifest. All shards except the last have ``shard_rows`` rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            self.rows: int = index["rows"]
            self.shard_rows: int = index["shard_rows"]
            self._part_shards: int = index["part_shards"]
        else:  # one file, written by an earlier version
            metadata = pq.read_metadata(path)
            self.rows, self.shard_rows = metadata.num_rows, metadata.row_group(0).num_rows
            self._part_shards = metadata.num_row_groups

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / self.shard_rows)

    def rows_in(self, shard: int) -> int:
        """Return the number of rows in a shard."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def shard(self, number: int, max_pixels: int) -> list[CaptionRow]:
        """Return the rows of one shard."""
        part, group = divmod(number, self._part_shards)
        with pq.ParquetFile(_part(self.path, part) if self.path.is_dir() else self.path) as file:
            return manifest_rows(file.read_row_group(group), max_pixels)

    def all_rows(self, max_pixels: int) -> Iterator[CaptionRow]:
        """Yield the rows of all shards."""
        return chain.from_iterable(self.shard(number, max_pixels) for number in range(self.shards))


def write_manifest(
    settings: InputSection, path: Path, shard_rows: int, say: Callable[[str], None] = print
) -> ManifestFacts:
    """List all inputs in the folder ``path``, which appears when it is complete.

    This needs memory for one shard and 2²⁰ hashes of keys, and in addition for `RepeatedKeys`.

    Raises:
        ConfigError: no row has the column of the prompt, the key or the images, or the keys cannot be read.
        DataError: a file cannot be read at all, or there are no rows.
        StorageError: the manifest cannot be written.
    """
    listing = _Listing(settings)
    problems: Counter[str] = Counter()

    def counted(rows: Iterable[CaptionRow], hashes: KeyHashes) -> Iterator[CaptionRow]:
        for number, row in enumerate(rows, start=1):
            hashes.add(row.key)
            if row.problem:
                problems[row.problem.kind] += 1
            if number % _REPORT_EVERY == 0:
                say(f"{number:,} rows listed")
            yield row

    rows = _errors_of_inputs(listing.rows(), settings.source)
    if settings.keys is not None:
        keys = frozenset(read_setting(settings.keys, "input.keys").splitlines())
        rows = (row for row in rows if row.key in keys)
    with atomic_folder(path) as partial:
        hashes = KeyHashes(partial)
        _write(partial, counted(islice(rows, settings.limit), hashes), shard_rows)
        if not hashes:
            raise DataError(f"input.source = {settings.source}: there is nothing to caption{listing.hint()}")
        repeated = RepeatedKeys(hashes)
        if repeated.hashes.size:
            _rename(partial, repeated, settings.max_pixels)
            if repeated.without_problem:
                problems["duplicate key"] = repeated.without_problem
        hashes.remove()
    return ManifestFacts(len(hashes), dict(problems.most_common()), dict(listing.passed_over))


def write_rows(path: Path, rows: Iterable[CaptionRow], shard_rows: int) -> None:
    """Write a manifest of rows whose keys are unique. The folder ``path`` appears when it is complete.

    Raises:
        StorageError: the manifest cannot be written.
    """
    with atomic_folder(path) as partial:
        _write(partial, rows, shard_rows)


def _errors_of_inputs(rows: Iterator[CaptionRow], source: str) -> Iterator[CaptionRow]:
    """Yield the rows; an `OSError` while they are read is about the inputs, and not about the manifest."""
    try:
        yield from rows
    except OSError as error:
        name = source if error.filename is None else os.fsdecode(error.filename)
        raise DataError(f"input.source: {name} cannot be read: {cause_and_remedy(error)}") from error


def _write(folder: Path, rows: Iterable[CaptionRow], shard_rows: int) -> None:
    rows = iter(rows)
    shards = iter(lambda: list(islice(rows, shard_rows)), [])
    written = 0
    for part in count():
        first = next(shards, None)
        if first is None:
            break
        with pq.ParquetWriter(_part(folder, part), MANIFEST_SCHEMA, compression="zstd") as writer:
            for shard in chain([first], islice(shards, _PART_SHARDS - 1)):
                writer.write_table(manifest_table(shard), row_group_size=shard_rows)
                written += len(shard)
    index = {"rows": written, "shard_rows": shard_rows, "part_shards": _PART_SHARDS}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _rename(folder: Path, repeated: RepeatedKeys, max_pixels: int) -> None:
    """Write a manifest again, with new keys in place of those that repeat."""
    again = folder / "again"
    again.mkdir()
    manifest = Manifest(folder)
    _write(again, repeated.renamed(manifest.all_rows(max_pixels)), manifest.shard_rows)
    for file in again.iterdir():
        file.replace(folder / file.name)
    again.rmdir()


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


# --------------------------------------------------------------------------------------------- rows


class _Listing:
    """Converts records of the inputs to rows of the manifest."""

    def __init__(self, settings: InputSection) -> None:
        self.settings = settings
        self.template = None if settings.prompt is None else PromptTemplate(settings.prompt)
        self.images = ("image", "images") if settings.image is None else (settings.image,)
        self.root = None if settings.image_root is None else absolute(settings.image_root)
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
        if self.template is None and not has_conversation(present):
            raise ConfigError(
                f"input.prompt is null, but rows of {self.settings.source} have {NO_CONVERSATION}: give a "
                "prompt"
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
        root = posixpath.dirname(record.file) if self.root is None else self.root
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
        key, source, *shown = (text.encode(errors="backslashreplace").decode() for text in texts)
        reason = "a text of the row is not valid Unicode"
        if any(_UNDECODED.search(str(image)) for image in row.images):
            reason = f"the file name {shown[-1]} is not UTF-8: rename it, for example with convmv"
        return CaptionRow(key, source, problem=Problem("broken record", reason))
    return row
