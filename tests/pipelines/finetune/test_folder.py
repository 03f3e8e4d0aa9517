"""A run continues from its last complete checkpoint, also if Ray Train's list of checkpoints is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines._compat import CHECKPOINT_LIST
from pipelines.finetune.folder import STATE, FinetuneFolder


def checkpoints(folder: FinetuneFolder, *, cut: int | None = None) -> None:
    """Three checkpoints, of which the last may be cut off."""
    for step in (2, 4, 6):
        file = folder.checkpoints / f"checkpoint_{step:08d}" / STATE
        file.parent.mkdir(parents=True)
        torch.save({"step": step}, file)
    if cut is not None:
        file.write_bytes(file.read_bytes()[:cut])


def names(folder: FinetuneFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


TEXTS = {"empty": "", "cut off": '{"ray_version": "2.60', "zeros": "\0" * 60, "none": None}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("cut", "last"), [(None, 6), (0, 4), (100, 4), (-1, 4)])
def test_without_a_list_the_last_complete_checkpoint_is_kept(text, cut, last, tmp_path):
    folder = FinetuneFolder(tmp_path, "run")
    checkpoints(folder, cut=cut)
    if text is not None:
        (folder.checkpoints / CHECKPOINT_LIST).write_text(text)
    start_from = folder.repair_checkpoints()
    assert start_from is not None
    assert torch.load(start_from / STATE, weights_only=True) == {"step": last}
    assert names(folder) == [start_from.name]
    assert folder.has_work


def test_with_a_list_nothing_changes(tmp_path):
    folder = FinetuneFolder(tmp_path, "run")
    checkpoints(folder, cut=10)
    (folder.checkpoints / CHECKPOINT_LIST).write_text(json.dumps({"ray_version": "2.60.0"}))
    before = names(folder)
    assert folder.repair_checkpoints() is None
    assert names(folder) == before


def test_without_a_complete_checkpoint_the_run_starts_again(tmp_path):
    folder = FinetuneFolder(tmp_path, "run")
    assert folder.repair_checkpoints() is None
    Path(folder.checkpoints, "checkpoint_00000002").mkdir(parents=True)
    assert folder.repair_checkpoints() is None
    assert not folder.has_work
