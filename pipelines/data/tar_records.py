"""Read WebDataset tars: files that share a name up to its first dot are one row.

Rows refer to images by their position in the tar. Rows of a compressed tar hold the bytes of their images
instead, because a position in it can only be reached from its beginning.
"""

from __future__ import annotations

import gzip
import json
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import IO, Any

from pipelines.data.formats import IMAGE_SUFFIXES, rows_of
from pipelines.data.images import InlineImage, TarImage
from pipelines.data.records import Record
from skipvision.errors import DataError

_LARGEST_IMAGE = 2**28
_LARGEST_TEXT = 16 * 2**20
_BLOCK = 512
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


def tar_records(
    file: str, columns: Collection[str], images: Sequence[str], max_pixels: int, compression: str = ""
) -> Iterator[Record]:
    """Yield the rows of one tar, in its order.

    A row has its ``__key__``, the fields of its ``.json`` and its text files under their extensions, if
    ``columns`` has them. Its image file is a column named after its extension if ``images`` has that, or the
    column ``image`` if ``images`` has that.

    Raises:
        DataError: the file is no tar, or has another compression.
    """
    with rows_of(file, compression) as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 — the stream is what is closed
        except (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError) as error:
            kind = f"tar with compression {compression}" if compression else "uncompressed tar"
            raise DataError(f"{file} is not a readable {kind}: {error}") from None
        number = 0
        for key, members in groupby(_members(tar), key=_key):
            number += 1
            value: dict[str, Any] = {"__key__": key}
            problem = ""
            for member in members:
                try:
                    _add(value, file, tar, member, columns, images, max_pixels, inline=bool(compression))
                except (ValueError, RecursionError, *_DAMAGED) as error:
                    problem = f"{member.name} cannot be read: {error}"
            yield Record(file, f"sample {key}", key, value, problem)
        if problem := _damage(tar, stream):
            yield Record(file, "the end", f"{posixpath.basename(file)}-{number + 1}", None, problem)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = tar.next()
        except _DAMAGED:
            return  # `_damage` reports it
        if member is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them in memory
        if member.isreg() and not posixpath.basename(member.name).startswith("."):
            yield member


def _key(member: tarfile.TarInfo) -> str:
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])


def _add(
    value: dict[str, Any],
    file: str,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    columns: Collection[str],
    images: Sequence[str],
    max_pixels: int,
    *,
    inline: bool,
) -> None:
    extension = posixpath.basename(member.name).partition(".")[2]
    if extension in images or (f".{extension.lower()}" in IMAGE_SUFFIXES and "image" in images):
        column = extension if extension in images else "image"
        if column in value:
            raise ValueError("the sample has several images: set input.image to one extension")
        if inline:
            name = f"{file}[{member.name}]"
            value[column] = InlineImage(_content(tar, member, _LARGEST_IMAGE), name, max_pixels)
        else:
            value[column] = TarImage(file, member.name, member.offset_data, member.size, max_pixels)
    elif extension == "json":
        fields = json.loads(_text(tar, member))
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        value.update({name: field for name, field in fields.items() if name in columns})
    elif extension in columns:
        value[extension] = _text(tar, member)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    return _content(tar, member, _LARGEST_TEXT).decode("utf-8-sig")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, largest: int) -> bytes:
    if member.size > largest:
        raise ValueError(f"it has {member.size} bytes, more than {largest}")
    content = tar.extractfile(member)
    if content is None:
        raise ValueError("it is no regular file")
    return content.read()


def _damage(tar: tarfile.TarFile, stream: IO[bytes]) -> str:
    """Return the damage after the last readable member; "" if none. tarfile ends silently at a bad header."""
    try:
        stream.seek(max(0, tar.offset - 1))
        if tar.offset and not stream.read(1):
            return "the tar ends in the middle of a file"
        stream.seek(tar.offset)
        end = stream.read(_BLOCK)
    except _DAMAGED as error:
        return f"the tar is damaged or cut off here: {error}; the rest is not read"
    return "the tar is damaged here; the rest is not read" if any(end) else ""
