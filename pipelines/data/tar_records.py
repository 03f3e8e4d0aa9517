"""Read WebDataset tars: files that share a name up to its first dot are one row.

Rows refer to images by their position in the tar, so it must be uncompressed.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby
from typing import IO, Any

import fsspec

from pipelines.data.images import TarImage
from pipelines.data.records import Record
from skipvision.errors import DataError

_EXTENSIONS = "jpg jpeg jpe jfif png webp avif gif bmp dib tif tiff ppm pgm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in _EXTENSIONS.split())
"""Suffixes of image files, in lower case."""

_LARGEST_TEXT = 16 * 2**20
_BLOCK = 512


def tar_records(
    file: str, columns: Collection[str], images: Sequence[str], max_pixels: int
) -> Iterator[Record]:
    """Yield the rows of one tar, in its order.

    A row has its ``__key__``, the fields of its ``.json`` and its text files under their extensions, if
    ``columns`` has them. Its image file is a column named after its extension if ``images`` has that, or the
    column ``image`` if ``images`` has that.

    Raises:
        DataError: the file is no uncompressed tar.
    """
    with fsspec.open(file, "rb") as stream:
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 — the stream is what is closed
        except tarfile.TarError as error:
            raise DataError(f"{file} is not a readable uncompressed tar: {error}") from None
        number = 0
        for key, members in groupby(_members(tar), key=_key):
            number += 1
            value: dict[str, Any] = {"__key__": key}
            problem = ""
            for member in members:
                try:
                    _add(value, file, tar, member, columns, images, max_pixels)
                except (ValueError, RecursionError, OSError, tarfile.TarError) as error:
                    problem = f"{member.name} cannot be read: {error}"
            yield Record(file, f"sample {key}", key, value, problem)
        if problem := _damage(tar, stream):
            yield Record(file, "the end", f"{posixpath.basename(file)}-{number + 1}", None, problem)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
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
) -> None:
    extension = posixpath.basename(member.name).partition(".")[2]
    if extension in images or (f".{extension.lower()}" in IMAGE_SUFFIXES and "image" in images):
        column = extension if extension in images else "image"
        if column in value:
            raise ValueError("the sample has several images: set input.image to one extension")
        value[column] = TarImage(file, member.name, member.offset_data, member.size, max_pixels)
    elif extension == "json":
        fields = json.loads(_text(tar, member))
        if not isinstance(fields, dict):
            raise ValueError("it is no JSON object")
        value.update({name: field for name, field in fields.items() if name in columns})
    elif extension in columns:
        value[extension] = _text(tar, member)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _LARGEST_TEXT:
        raise ValueError(f"it has {member.size} bytes, more than {_LARGEST_TEXT}")
    content = tar.extractfile(member)
    if content is None:
        raise ValueError("it is no regular file")
    return content.read().decode("utf-8-sig")


def _damage(tar: tarfile.TarFile, stream: IO[bytes]) -> str:
    """Return the damage after the last readable member; "" if none. tarfile ends silently at a bad header."""
    stream.seek(tar.offset - 1)
    if tar.offset and not stream.read(1):
        return "the tar ends in the middle of a file"
    stream.seek(tar.offset)
    end = stream.read(_BLOCK)
    return "the tar is damaged here; the rest is not read" if any(end) else ""
