"""Formats of files by their names: which are read, with which compression, and which are refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import IO, NamedTuple, cast

import pyarrow as pa

from pipelines.data.storage import failure_of, open_file
from skipvision.errors import DataError
from skipvision.files import NotAFileError

_IMAGES = "jpg jpeg jpe jfif png webp avif gif bmp dib tif tiff ppm pgm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in _IMAGES.split())
"""Suffixes of image files, in lower case."""

_FORMATS = {
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "tar": (".tar",),
    "tsv": (".tsv",),
}
_BY_SUFFIX = {suffix: name for name, suffixes in _FORMATS.items() for suffix in suffixes}
_COMPRESSED = ("json", "jsonl", "tar")
_COMPRESSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
_TARS = {".tgz": "gz", ".tbz": "bz2", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zst"}
_UNREAD = (
    "csv zip 7z rar lz4 br z xls xlsx ods orc avro npy npz pkl pickle pt pth "
    "safetensors h5 hdf5 mat lmdb mdb db sqlite tfrecord tfrecords beton rec idx bin pdf doc docx ppt pptx "
    "mp4 mov avi mkv webm mp3 wav flac svg heic heif cr2 nef dng psd"
)
_OTHERS = frozenset(f".{extension}" for extension in _UNREAD.split())
"""Suffixes of files that are no images that we read, and no rows."""

_REMEDIES = {
    ".csv": "convert it, for example with pandas: read_csv(…).to_json(…, orient='records', lines=True)",
    ".zip": "unpack it and give the folder",
    ".7z": "unpack it and give the folder",
    ".rar": "unpack it and give the folder",
    ".xlsx": "export it as JSON lines",
    ".heic": "convert it to JPEG or PNG",
    ".svg": "convert it to PNG",
}


class Format(NamedTuple):
    """The format of a file of rows (``"jsonl"``) and its compression (``"gz"``; "" if none)."""

    name: str
    compression: str = ""


def format_of(file: str) -> Format | None:
    """Return the format of a file of rows by its suffixes; None if they are not those of such a file."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(file).suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    if last in _TARS:
        return Format("tar", _TARS[last])
    if last in _COMPRESSIONS:
        inner = _BY_SUFFIX.get(suffixes[0]) if len(suffixes) > 1 else None
        return Format(inner, _COMPRESSIONS[last]) if inner else None
    return Format(_BY_SUFFIX[last]) if last in _BY_SUFFIX else None


@lru_cache(maxsize=64)  # it is needed for every row of a file
def name_of_rows(path: str) -> str:
    """Return the path of a file of rows without the suffixes of its format and its compression."""
    found = format_of(path)
    suffixes = 0 if found is None else 1 + bool(found.compression)
    for _ in range(min(suffixes, len(PurePosixPath(path).suffixes))):
        suffix = PurePosixPath(path).suffix
        path = path.removesuffix(suffix)
        if suffix.lower() in _TARS:
            break
    return path


def check_format(file: str, allowed: Collection[str]) -> Format | None:
    """Return `format_of` a file.

    Raises:
        DataError: its format, or its compression, is known and cannot be read; the message names those that
            can.
    """
    found = format_of(file)
    suffix = PurePosixPath(file).suffix.lower()
    if found is None:
        if suffix not in _OTHERS and suffix not in _COMPRESSIONS:
            return None
        raise DataError(unsupported(file, allowed))
    if found.name not in allowed:
        raise DataError(unsupported(file, allowed))
    if found.compression and found.name not in _COMPRESSED:
        raise DataError(
            f"{file}: compressed {_FORMATS[found.name][0]} files cannot be read, because their rows are read "
            "in any order: decompress it first"
        )
    return found


def unsupported(file: str, allowed: Collection[str]) -> str:
    """Return the message for a file whose format is not read here, with the formats that are."""
    suffix = PurePosixPath(file).suffix.lower()
    known = ", ".join(ending for name in allowed for ending in _FORMATS[name])
    compressed = [ending for name in allowed if name in _COMPRESSED for ending in _FORMATS[name]]
    if compressed:
        known += f" (of these {', '.join(compressed)} also as {', '.join(_COMPRESSIONS)})"
    remedy = f"; {_REMEDIES[suffix]}" if suffix in _REMEDIES and "jsonl" in allowed else ""
    return f"{file} has the unsupported suffix {suffix!r}; use {known}{remedy}"


@contextmanager
def rows_of(file: str, compression: str = "") -> Iterator[IO[bytes]]:
    """Open a file of rows, decompressed and seekable.

    Raises:
        DataError: it does not exist, access is denied, the storage fails, or the compression is damaged; also
            if one of these happens in the block.
    """
    try:
        with open_file(file) as stream, _decompressed(stream, compression) as content:
            yield content
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is damaged or cut off: {error}; copy or compress it again") from None
    except DataError:
        raise
    except NotAFileError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:  # storage back ends raise errors of many types
        failure = failure_of(error)
        if failure is None and not isinstance(error, OSError):
            raise
        if isinstance(failure, FileNotFoundError):
            raise DataError(f"{file} does not exist") from None
        raise DataError(f"{file} cannot be read: {failure or error}") from error


def _decompressed(stream: IO[bytes], compression: str) -> IO[bytes]:
    if compression == "gz":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=stream))
    if compression == "bz2":
        return bz2.BZ2File(stream)
    if compression == "xz":
        return lzma.LZMAFile(stream)
    if compression == "zst":  # has no reader in this Python, and that of Arrow cannot seek
        copy = tempfile.TemporaryFile()  # noqa: SIM115 — the caller closes it
        try:
            shutil.copyfileobj(pa.CompressedInputStream(stream, "zstd"), copy, 2**20)
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy
    return stream
