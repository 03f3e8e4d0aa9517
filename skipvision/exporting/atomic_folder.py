"""Write an exported model's folder atomically: it appears complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipvision.adapters.files import put_in_place
from skipvision.errors import AdapterError, ConfigError
from skipvision.exporting.read import settings_of


def check_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise `ConfigError` if a model cannot be exported to a folder.

    Args:
        folder: absolute path.
        overwrite: whether an exported model there may be replaced.
    """
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"{folder}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{folder}: {parent} is not writable: choose another folder")
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"{folder} exists, and is not overwritten: choose another folder, delete it, or set overwrite"
        )
    if folder.is_symlink() or not _is_exported(folder):
        raise ConfigError(
            f"{folder} exists and holds no exported model, so it is not overwritten: choose another folder"
        )


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` when the block ends, and vanishes if it fails.

    Raises:
        ConfigError: another process writes to the same folder, or something has appeared there meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.partial")) as partial:
        try:
            yield partial
            check_destination(folder, overwrite=overwrite)
            _replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _locked(partial: Path) -> Iterator[Path]:
    """Create an empty folder and claim it for this process."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{partial} is being written by another process: wait for it") from None
            # The previous owner may have renamed the folder after it was opened and before it was claimed.
            if _is_at(partial, descriptor):
                _empty(partial)
                yield partial
                return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; an old model there is deleted once the new one is in place."""
    for path in partial.rglob("*"):
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    put_in_place(partial, folder, old)


def _sync(path: Path) -> None:
    """Write a file to the disk: after a crash of the machine a renamed folder must not hold empty files."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_exported(folder: Path) -> bool:
    try:
        return settings_of(folder) is not None
    except AdapterError:
        return True  # by another version
    except ConfigError:
        return False
