"""Fixtures of the jobs' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.disk import Disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small file system in memory."""
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()
