"""A full disk, a read-only folder and missing permissions end in a message; afterwards the job continues."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipelines.caption.attempts import Attempts
from pipelines.caption.config import InputSection
from pipelines.caption.folder import CaptionShards
from pipelines.caption.manifest import write_manifest
from pipelines.caption.rows import Caption, CaptionRow
from pipelines.data.images import ImageError
from pipelines.data.rejects import LateRejects
from pipelines.data.rows import TrainingRow
from pipelines.shared.config import run_job
from pipelines.shared.files import StorageError, atomic, write_text
from pipelines.shared.folder import JobFolder
from pipelines.tracking.client import TrackingStorageError, sqlite_uri
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError, DataError
from tests.pipelines.disk import Disk

TROUBLES = {
    "full": (Disk.fill, "No space left on device; free space there"),
    "read-only": (Disk.make_read_only, "Read-only file system; make the file system writable"),
}


def manifest(folder: Path, images: Path) -> None:
    write_manifest(InputSection(source=str(images), prompt="What?"), folder / "manifest", 4, print)


def attempts(folder: Path, _: Path) -> None:
    Attempts(folder / "attempts").begin("0-0")


def state(folder: Path, _: Path) -> None:
    job = JobFolder(folder.parent, folder.name)
    job.remember(text="x" * 5000)


def captions(kind: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, _: Path) -> None:
        CaptionShards(folder, kind).write(0, [Caption("key", "text " * 9)] * 300)

    return write


def late_rejects(folder: Path, _: Path) -> None:
    reject = LateRejects(folder / "rejects.jsonl", ("train",), stop=False)
    reject(TrainingRow("a", (), (), source="t.json: row 1"), ImageError("é" * 5000))


def checkpoint_of_base_training(folder: Path, _: Path) -> None:
    """`torch.save` and its error, which hides the cause."""
    with atomic(folder / "state.pt") as partial, partial.open("wb") as file:
        torch.save({"a": torch.zeros(5000)}, file)


def weights(folder: Path, _: Path) -> None:
    """safetensors names the cause only in the text of its error."""
    with atomic(folder / "weights.safetensors") as partial:
        safetensors.torch.save_file({"a": torch.zeros(5000)}, partial)


def store(folder: Path, _: Path) -> None:
    """MLflow's tables, which it cannot use if they are incomplete."""
    Tracker.start(sqlite_uri(folder / "mlflow.db"), experiment="e", run_name="r", artifacts=folder / "a")


WRITERS = {
    "manifest": manifest,
    "attempts": attempts,
    "run.json": state,
    "captions": captions("parquet"),
    "captions as JSON": captions("jsonl"),
    "rejects": late_rejects,
    "checkpoint": checkpoint_of_base_training,
    "weights": weights,
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
    if writer not in ("attempts", "rejects"):
        assert set(folder.iterdir()) == before
    assert not any(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    disk.restore()
    WRITERS[writer](folder, shapes_data / "images" / "train")
    assert not list(folder.glob(".*"))


def test_a_store_of_mlflow_that_was_not_created_is_created_by_the_next_start(disk):
    disk.grow("300k")  # it needs 600k
    with pytest.raises(TrackingStorageError, match=r"mlflow\.db: No space left on device; free space there"):
        store(disk.path, disk.path)
    assert list(disk.path.iterdir()) == []
    disk.grow("4m")
    store(disk.path, disk.path)
    assert [file.name for file in disk.path.iterdir()] == ["mlflow.db"]


def test_a_store_of_mlflow_that_is_full_later_is_an_error_of_the_disk(disk):
    disk.grow("4m")
    store(disk.path, disk.path)
    disk.fill()
    with pytest.raises(TrackingStorageError, match="No space left on device; free space"):  # noqa: PT012
        for _ in range(20):  # the last page of the file has room
            store(disk.path, disk.path)
    disk.restore()
    store(disk.path, disk.path)


def images_of(error: OSError) -> Iterator[Any]:
    yield CaptionRow("a", "a.png")
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied", "/photos/a"),
        OSError(errno.ESTALE, "Stale file handle", "/photos/b"),
        OSError(errno.EMFILE, "Too many open files"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/photos/c"),
    ],
    ids=lambda error: error.strerror,
)
def test_an_error_of_the_inputs_names_them_and_not_the_manifest(error, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.caption.manifest._Listing.rows", lambda _: images_of(error))
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError) as found:
        write_manifest(InputSection(source=str(tmp_path / "in"), prompt="What?"), tmp_path / "m", 4)
    assert f"{error.filename or tmp_path / 'in'} cannot be read: {error.strerror}" in str(found.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_an_error_about_another_file_names_that_file(tmp_path):
    with pytest.raises(StorageError, match=f"cannot use {tmp_path}/other/b: "), atomic(tmp_path / "a" / "b"):
        (tmp_path / "other" / "b").read_text()


def test_other_errors_in_the_block_of_a_writer_stay(tmp_path):
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
