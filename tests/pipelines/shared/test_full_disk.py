"""A full disk, a read-only folder and missing permissions end in a message; afterwards the job continues."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.caption.attempts import Attempts
from pipelines.caption.config import InputSection
from pipelines.caption.folder import CaptionShards
from pipelines.caption.manifest import write_manifest
from pipelines.caption.rows import Caption
from pipelines.shared.config import run_job
from pipelines.shared.files import StorageError, atomic, write_text
from pipelines.shared.folder import JobFolder
from skipvision.errors import ConfigError

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_ONLY, _REMOUNT, _DETACH = 1, 32, 2


class Disk:
    """A small file system in memory at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount(0)

    def _mount(self, flags: int) -> None:
        if _LIBC.mount(b"tmpfs", bytes(self.path), b"tmpfs", flags, b"size=256k"):
            pytest.skip(f"this user may not mount a file system: {os.strerror(ctypes.get_errno())}")

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    def make_read_only(self) -> None:
        self._mount(_REMOUNT | _READ_ONLY)

    def restore(self) -> None:
        self._mount(_REMOUNT)
        (self.path / "filler").unlink(missing_ok=True)

    def unmount(self) -> None:
        _LIBC.umount2(bytes(self.path), _DETACH)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


TROUBLES = {
    "full": (Disk.fill, "No space left on device; free space there"),
    "read-only": (Disk.make_read_only, "Read-only file system; make the file system writable"),
}


def manifest(folder: Path, images: Path) -> None:
    write_manifest(InputSection(source=str(images), prompt="What?"), folder / "manifest.parquet", 4, print)


def attempts(folder: Path, _: Path) -> None:
    Attempts(folder / "attempts").begin("0-0")


def state(folder: Path, _: Path) -> None:
    job = JobFolder(folder.parent, folder.name)
    job.remember(text="x" * 5000)


def captions(kind: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, _: Path) -> None:
        CaptionShards(folder, kind).write(0, [Caption("key", "text " * 9)] * 300)

    return write


WRITERS = {
    "manifest": manifest,
    "attempts": attempts,
    "run.json": state,
    "captions": captions("parquet"),
    "captions as JSON": captions("jsonl"),
    "any text": lambda folder, _: write_text(folder / "table.md", "x" * 5000),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_error_names_the_file_the_cause_and_the_remedy(writer, trouble, disk, shapes_data):
    folder = disk.path / "run"
    folder.mkdir()
    act, words = TROUBLES[trouble]
    act(disk)
    before = set(folder.iterdir())
    with pytest.raises(StorageError, match=words) as error:
        WRITERS[writer](folder, shapes_data / "images" / "train")
    assert str(folder) in str(error.value)
    assert "run the same job again" in str(error.value)
    if writer != "attempts":
        assert set(folder.iterdir()) == before
    disk.restore()
    WRITERS[writer](folder, shapes_data / "images" / "train")
    assert not list(folder.glob(".*"))


def test_an_error_of_the_inputs_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "file") as partial:  # noqa: PT012
        partial.touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_every_other_file_of_a_job_is_covered_by_its_folder(disk):
    """Files that libraries write: figures, adapters, copies."""
    act, words = TROUBLES["full"]
    job = JobFolder(disk.path, "run")
    with pytest.raises(StorageError, match=words), job.claimed():  # noqa: PT012
        job.remember(a=1)
        act(disk)
        shutil.copyfile(sys.executable, job.path / "copy")
    disk.restore()
    with job.claimed():
        assert job.state == {"a": 1}


def test_a_new_job_on_a_read_only_disk_names_its_storage(disk):
    disk.make_read_only()
    with pytest.raises(ConfigError, match=r"storage = .*: cannot write to .*Read-only"):
        JobFolder(disk.path, "run").claimed().__enter__()


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "refused"), FileNotFoundError(2, "gone", "/x/y")]
)
def test_errors_that_are_not_of_the_jobs_files_stay(error, tmp_path):
    with pytest.raises(type(error)), JobFolder(tmp_path, "run").claimed():
        raise error


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_job_without_a_folder_prints_the_same_message(trouble, disk, capsys):
    act, words = TROUBLES[trouble]
    act(disk)

    def main(argv: list[str]) -> dict[str, object]:
        (disk.path / "file").write_text("x" * 5000)
        return {}

    with pytest.raises(SystemExit) as end:
        run_job(main, [])
    assert end.value.code == 1
    assert words in capsys.readouterr().err


def test_a_folder_without_permission_is_named(tmp_path):
    """Root may write anywhere, so that another user tries."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    code = (
        "import os, sys; from pipelines.shared.files import write_text; from pathlib import Path\n"
        "from pipelines.shared.config import run_job\n"
        "os.setuid(65534)\n"
        "run_job(lambda _: write_text(Path(sys.argv[1], 'file'), 'x') or {}, [])"
    )
    done = subprocess.run([sys.executable, "-c", code, "/root"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: cannot write /root/file: Permission denied; give this user the permission, or choose another "
        "folder, then run the same job again to continue\n"
    )
