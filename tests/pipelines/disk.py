"""A small disk that can be full or read-only."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT, _DETACH = 1, 32, 2


class Disk:
    """A small file system in memory at ``path``."""

    def __init__(self, path: Path, size: str = "256k") -> None:
        self.path, self.size = path, size
        path.mkdir()
        self._mount(0)

    def _mount(self, flags: int) -> None:
        if _LIBC.mount(b"tmpfs", bytes(self.path), b"tmpfs", flags, f"size={self.size}".encode()):
            pytest.skip(f"this user may not mount a file system: {os.strerror(ctypes.get_errno())}")

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    def grow(self, size: str) -> None:
        self.size = size
        self._mount(_REMOUNT)

    def make_read_only(self) -> None:
        self._mount(_REMOUNT | _READ_ONLY)

    def restore(self) -> None:
        self._mount(_REMOUNT)
        (self.path / "filler").unlink(missing_ok=True)

    def unmount(self) -> None:
        _LIBC.umount2(bytes(self.path), _DETACH)
