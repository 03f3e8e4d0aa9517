"""Open files at local paths and URLs, and name the reason if that fails.

A local path is never parsed: ``#``, ``%``, ``::``, ``[`` and ``~`` are ordinary characters in it. An image at
an HTTP URL is read by one GET, because many servers send no length, allow no ranges or answer no HEAD.
Temporary failures are repeated with growing pauses; a server's ``Retry-After`` is honoured up to a limit.
"""

from __future__ import annotations

import asyncio
import email.utils
import io
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from pipelines.shared.paths import equivalent_path
from skipvision.files import check_regular

T = TypeVar("T")

_TRIES = 4
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
"""Seconds; a longer ``Retry-After`` is cut to it."""
_GIVEN_UP = 3
"""After this many files in a row that no repetition could read, files of the host are tried once each."""
_TIMEOUT = aiohttp.ClientTimeout(total=600, sock_connect=20, sock_read=60)
_LARGEST = 2**30
"""Max bytes of one image at an HTTP URL; the server may send without end."""
_TEMPORARY = frozenset({408, 425, 429, *range(500, 600)}) - {501, 505}
"""Proxies and content networks have codes of their own, such as 520 to 529."""
_ABSENT = frozenset({404, 410})
_SCHEME = re.compile(r"(^|::)[A-Za-z][A-Za-z0-9+.-]*://")

_failures: Counter[str] = Counter()
_download_lock = threading.Lock()


class RefusedError(PermissionError):
    """The storage exists but denies access; repeating the request does not help."""


class UnreachableError(ConnectionError):
    """The storage failed for now: it is overloaded, does not answer, or breaks off.

    ``pause`` is the time to wait in seconds, if the server gave one. ``repeat`` says whether to try again.
    """

    def __init__(self, message: str, pause: float | None = None, *, repeat: bool = True) -> None:
        super().__init__(message)
        self.pause, self.repeat = pause, repeat


def absolute(path: str) -> str:
    """Return a path that is valid in every process: an absolute path, or a URL with its scheme in lower case.

    A file URL becomes a path.
    """
    path = _with_lower_scheme(path)
    for prefix in ("file://", "local://"):
        if path.startswith(prefix):
            path = path.removeprefix(prefix)
            plain = unquote(path)
            return plain if not Path(path).exists() and Path(plain).exists() else path
    return path if "://" in path else str(Path(path).expanduser().absolute())


def locate(path: str) -> tuple[Any, str]:
    """Return the file system of a path or URL and the name of the file in it.

    Raises:
        ImportError, ValueError: an unknown protocol, or one whose package is missing.
    """
    if "://" in path:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(_with_lower_scheme(path)))
    return LocalFileSystem(), equivalent_path(path)


def is_local(fs: Any) -> bool:
    """Return whether a file system that `locate` returned is the local one."""
    return isinstance(fs, LocalFileSystem)


def open_file(path: str) -> IO[bytes]:
    """Open a file of rows for reading at any position.

    Raises:
        OSError: `FileNotFoundError`, `PermissionError`, `NotAFileError` and `UnreachableError` among others.
    """
    fs, name = locate(path)
    if isinstance(fs, LocalFileSystem):
        check_regular(name)
        return Path(name).open("rb")
    if not _is_http(path):
        return cast("IO[bytes]", _repeated(path, partial(fs.open, name, "rb")))
    size = _repeated(path, lambda: sync(fs.loop, _size_if_ranges, fs, name))
    if size is not None:
        return cast("IO[bytes]", fs.open(name, "rb", size=size))
    with _download_lock:
        return Path(_downloaded(path).name).open("rb")


def open_image_file(path: str) -> IO[bytes]:
    """Open an image. Raise as `open_file`."""
    return io.BytesIO(read_file(path)) if _is_http(path) else open_file(path)


def read_file(path: str) -> bytes:
    """Return the bytes of a whole file. Raise as `open_file`."""
    fs, name = locate(path)
    if isinstance(fs, LocalFileSystem):
        check_regular(name)
        return Path(name).read_bytes()
    if not _is_http(path):
        return cast("bytes", _repeated(path, partial(fs.cat_file, name)))
    content = io.BytesIO()
    _repeated(path, lambda: sync(fs.loop, _get, fs, name, content, _LARGEST))
    return content.getvalue()


def check_file(path: str) -> None:
    """Return if a file exists. Raise as `open_file`; an HTTP server is not sent a HEAD."""
    fs, name = locate(path)
    if isinstance(fs, LocalFileSystem):
        check_regular(name)
    elif not _is_http(path):
        _repeated(path, partial(fs.info, name))
    else:
        _repeated(path, lambda: sync(fs.loop, _get, fs, name, None, 0))


def forget_downloads() -> None:
    """Delete downloaded copies of files, so that changed files are read again."""
    _downloaded.cache_clear()
    _failures.clear()


def failure_of(error: Exception) -> OSError | None:
    """Return the error as a `FileNotFoundError`, `RefusedError` or `UnreachableError`; None for any other."""
    if isinstance(error, FileNotFoundError | RefusedError | UnreachableError):
        return error
    if isinstance(error, PermissionError):
        return RefusedError(error.strerror or str(error))
    if isinstance(error, aiohttp.TooManyRedirects):
        return RefusedError(
            f"the server redirects without end (stopped after {len(error.history)} redirects)"
        )
    if isinstance(error, aiohttp.ClientResponseError):
        answer = f"the server answered {error.status} {error.message}".rstrip()
        if error.status in _ABSENT:
            return FileNotFoundError(answer)
        if error.status in _TEMPORARY:
            return UnreachableError(answer, _retry_after(error.headers or {}))
        return RefusedError(answer)
    if isinstance(error, aiohttp.ClientSSLError):
        return UnreachableError(f"the secure connection failed: {error}", repeat=False)
    if isinstance(error, aiohttp.InvalidURL):
        return None
    if isinstance(error, TimeoutError | asyncio.TimeoutError | fsspec.exceptions.FSTimeoutError):
        return UnreachableError("there was no answer in time")
    if isinstance(error, aiohttp.ClientError | ConnectionError):
        return UnreachableError(f"the connection failed: {error or type(error).__name__}")
    return None


# ----------------------------------------------------------------------------------------------- HTTP


def _is_http(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def _with_lower_scheme(path: str) -> str:
    """Return a URL, or a chain of them, with schemes in lower case, which is how fsspec knows them."""
    return _SCHEME.sub(lambda found: found[0].lower(), path) if "://" in path else path


def _repeated(path: str, action: Callable[[], T]) -> T:
    """Return the action's result; repeat it while its failure is temporary."""
    host = urlsplit(path).netloc
    tries = 1 if _failures[host] >= _GIVEN_UP else _TRIES
    for number in range(1, tries + 1):
        try:
            result = action()
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            if not isinstance(failure, UnreachableError):
                raise failure from None
            if number == tries or not failure.repeat:
                _failures[host] += 1
                times = f" ({number} tries)" if number > 1 else ""
                raise UnreachableError(f"{failure}{times}") from None
            pause = _FIRST_PAUSE * 2 ** (number - 1) if failure.pause is None else failure.pause
            time.sleep(min(pause, _LONGEST_PAUSE))
        else:
            _failures.pop(host, None)
            return result
    raise AssertionError("unreachable")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of ``Retry-After``, which is a number or a date; None if it is missing or wrong."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


async def _get(fs: Any, url: str, target: IO[bytes] | None, largest: int) -> None:
    """Write the body to ``target``, from its beginning; without a target, read only the status."""
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **{"timeout": _TIMEOUT, **fs.kwargs}) as response:
        response.raise_for_status()
        if target is None:
            response.close()
            return
        target.seek(0)
        target.truncate()
        async for chunk in response.content.iter_chunked(2**20):
            target.write(chunk)
            if largest and target.tell() > largest:
                raise OSError(f"the server sends more than {largest:,} bytes")


async def _size_if_ranges(fs: Any, url: str) -> int | None:
    """Return the size in bytes of a file of which parts can be read; None if the server only sends it all."""
    session = await fs.set_session()
    options = {"timeout": _TIMEOUT, **fs.kwargs}
    # Compressed parts are not parts of the file.
    options["headers"] = {**options.get("headers", {}), "Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), **options) as response:
        if response.status == 206:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            return int(total) if total.isdigit() else None
        if response.status in (*_ABSENT, *_TEMPORARY, 401, 403):
            response.raise_for_status()
        response.close()
    return None


@lru_cache(maxsize=2)
def _downloaded(url: str) -> Any:
    """Return a temporary file with the content of a URL; it is deleted when the cache drops it."""
    fs, name = locate(url)
    copy = tempfile.NamedTemporaryFile(prefix="skipvision-")  # noqa: SIM115 — the cache keeps it
    _repeated(url, lambda: sync(fs.loop, _get, fs, name, copy, 0))
    copy.flush()
    return copy
