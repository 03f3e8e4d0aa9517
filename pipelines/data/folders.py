"""Walk folders and match patterns, local or remote.

Linked folders are followed. Each real folder is read once, so links may form loops. A folder that cannot be
read is an error, because its files would be missing without notice.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from pipelines.data.storage import failure_of
from skipvision.errors import DataError


class Entry(NamedTuple):
    """A file: its name in the file system, and its path relative to the folder that was walked."""

    path: str
    below: str


def walk(fs: Any, root: str, *, hidden: bool = False, depth: int | None = None) -> Iterator[Entry]:
    """Yield the files below a folder: first those in it, then those of its subfolders, each sorted by name.

    Args:
        fs: the file system.
        root: the folder in it.
        hidden: include files and folders whose names begin with a dot.
        depth: the max number of names in a relative path; None = no limit.

    Raises:
        DataError: a folder cannot be read.
    """
    local = isinstance(fs, LocalFileSystem)
    links = _Links(root) if local else None
    waiting = [("", root)]
    while waiting:
        below, folder = waiting.pop()
        if links is not None and not links.is_new(folder, below, hidden=hidden):
            continue
        try:
            files, folders = _local_entries(folder) if local else _remote_entries(fs, folder)
        except Exception as error:  # storage back ends raise errors of many types
            raise _unreadable(folder, error) from error
        for name in sorted(files):
            if hidden or not name.startswith("."):
                yield Entry(posixpath.join(folder, name), posixpath.join(below, name))
        if depth is None or below.count("/") + bool(below) + 1 < depth:
            waiting += [
                (posixpath.join(below, name), posixpath.join(folder, name))
                for name in sorted(folders, reverse=True)
                if hidden or not name.startswith(".")
            ]


def matching(fs: Any, pattern: str) -> list[Entry]:
    """Return the files that match a pattern with ``*``, sorted; relative to its last folder without ``*``.

    In a local pattern only ``*`` is special; ``[`` and ``?`` are, if nothing matches otherwise.

    Raises:
        DataError: a folder cannot be read.
    """
    root = posixpath.dirname(pattern.split("*")[0])
    if not isinstance(fs, LocalFileSystem):
        names = [name for name in sorted(fs.glob(pattern)) if "*" not in name or not fs.isdir(name)]
        return [Entry(name, posixpath.relpath(name, root or ".")) for name in names]
    if not Path(root).is_dir():
        return []
    rest = posixpath.relpath(pattern, root) if root else pattern
    depth = None if "**" in rest else rest.count("/") + 1
    entries = sorted(walk(fs, root, hidden=True, depth=depth))
    for text in dict.fromkeys([re.sub(r"([\[?])", r"[\1]", rest), rest]):
        accepts = re.compile(glob_translate(text)).match
        if found := [entry for entry in entries if accepts(entry.below)]:
            return found
    return []


class _Links:
    """The real folders that were read, so that no link is followed to one of them."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self.seen: set[str] = set()

    def is_new(self, folder: str, below: str, *, hidden: bool) -> bool:
        real = os.path.realpath(folder)
        if real in self.seen:
            return False
        own = os.path.relpath(real, self.root)
        # A link to a folder that the walk reaches without links is left to that folder.
        reached = own.split("/")[0] != ".." and (
            hidden or own == "." or not any(part.startswith(".") for part in own.split("/"))
        )
        if reached and own != (below or "."):
            return False
        self.seen.add(real)
        return True


def _local_entries(folder: str) -> tuple[list[str], list[str]]:
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself; opening it reports the reason
                is_folder = False
            (folders if is_folder else files).append(entry.name)
    return files, folders


def _remote_entries(fs: Any, folder: str) -> tuple[list[str], list[str]]:
    files: list[str] = []
    folders: list[str] = []
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if path == folder.rstrip("/"):  # an object store's mark of the folder itself
            continue
        (folders if info["type"] == "directory" else files).append(posixpath.basename(path))
    return files, folders


def _unreadable(folder: str, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or failure_of(error) or error
    return DataError(
        f"the folder {folder} cannot be read: {reason}. Make it readable, move it elsewhere, or give a "
        "pattern with * that leaves it out"
    )
