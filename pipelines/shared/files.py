"""Files that appear complete or not at all, and errors that name the file and the remedy."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from skipvision.errors import ConfigError, SkipVisionError
from skipvision.files import check_regular

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make the file system writable, or choose another folder",
    errno.EACCES: "give this user the permission, or choose another folder",
    errno.EPERM: "give this user the permission, or choose another folder",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has too many open files",
}


class StorageError(SkipVisionError):
    """A file of a job cannot be written or read. The same job, run again, continues."""


@contextmanager
def storage_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Convert an `OSError` of the block, or a library's wrapper of one, to a `StorageError` about ``path``.

    If the error names a file outside the folder of ``path``, the `StorageError` is about that file.

    Raises:
        StorageError: ``path`` cannot be written or read.
    """
    try:
        yield
    except Exception as error:
        found = os_error_of(error)
        if found is None:
            raise
        named = None if found.filename is None else Path(os.fsdecode(found.filename))
        if named is not None and not named.is_relative_to(path.parent):
            raise storage_error(found, named, "use") from error
        raise storage_error(found, path, action) from error


def storage_error(error: OSError, path: Path | str, action: str = "write") -> StorageError:
    """Return the error about ``path`` with its cause and remedy."""
    return StorageError(f"cannot {action} {path}: {cause_and_remedy(error)}")


def cause_and_remedy(error: OSError) -> str:
    """Return the end of a message about an error of disks and permissions."""
    known = error.errno in _REMEDIES  # libraries add file positions and the like to the system's words
    cause = os.strerror(error.errno or 0) if known else error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0, "make the folder usable again")
    return f"{cause}; {remedy}, then run the same job again to continue"


def is_storage_error(error: BaseException | None) -> TypeGuard[OSError]:
    """Return whether the error is one of disks and permissions, and no bug."""
    return isinstance(error, OSError) and error.errno in _REMEDIES


def os_error_of(error: BaseException) -> OSError | None:
    """Return the `OSError` that an error is, or was caused by; None if it has another cause.

    safetensors puts the system's error number into its text. `torch.save` into an open file raises a
    `RuntimeError` while it handles the `OSError`.
    """
    if isinstance(error, OSError):
        return error
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    hidden = error.__context__
    return hidden if isinstance(error, RuntimeError) and is_storage_error(hidden) else None


def read_setting(path: str, field: str) -> str:
    """Return the text of a file that a setting names.

    Raises:
        ConfigError: it cannot be read, or is not text in UTF-8.
    """
    try:
        check_regular(path, or_descriptor=True)
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "")
        remedy = "give this user the permission to read it" if "permission" in remedy else "give a text file"
        raise ConfigError(f"{field} = {path}: {error.strerror or error}; {remedy}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field} = {path}: it is not text in UTF-8; give a text file") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` and rename it to ``path`` when the block succeeds.

    Only one process may write a path at a time. The next write replaces the
    ``.<name>.partial`` of a killed process.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with storage_errors(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # or after a crash of the machine the new name may hold an empty file
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error counts
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to ``path``. It replaces ``path`` when the block succeeds.

    The next write replaces the ``.<name>.partial`` of a killed process.

    Raises:
        StorageError: a file in the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with storage_errors(path):
            partial.mkdir()
            yield partial
            for name in partial.iterdir():
                with name.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(path, ignore_errors=True)
            partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
