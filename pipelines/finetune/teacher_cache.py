"""The teacher's predictions on disk, so that epochs after the first need no forward of the teacher.

Every worker appends to files of its own, and reads those of all workers: a later epoch gives its rows to
other workers. A row that is not found costs a forward of the teacher, nothing else::

    teacher/digest          of the model, the rows and the settings: others begin anew
            0-1234.bin      predictions of worker 0, in a process: log probabilities, then tokens
            0-1234.jsonl    a line for each row: its key, its offset, its numbers of positions and of tokens
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import skipvision as sv
from pipelines.data.chat import ChatFormat
from pipelines.data.rows import TrainingRow
from pipelines.engines.loading import load_processor
from pipelines.evaluation.fingerprints import of_model, of_rows
from pipelines.finetune.config import FinetuneConfig
from pipelines.shared.files import storage_errors, write_text
from skipvision.errors import ConfigError

_SAMPLE = 64
"""Rows whose answers are measured to estimate the size of the cache."""


class _Entry(NamedTuple):
    """The place of a row's predictions: n positions, with k tokens and one value for all others at each."""

    file: Path
    offset: int
    positions: int
    tokens: int


class TeacherCache:
    """The cache of one worker. Predictions are float32, as the teacher computed them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self._own = folder / f"{rank}-{os.getpid()}"
        self._entries: dict[str, _Entry] = {}
        self._read_to: dict[Path, int] = {}

    def get(self, keys: Sequence[str], temperature: float) -> sv.SoftTargets | None:
        """Return the predictions for these rows, one after the other; None if one of them is missing.

        Raises:
            StorageError: a file cannot be read.
        """
        if any(key not in self._entries for key in keys):
            self._refresh()
        entries = [self._entries.get(key) for key in keys]
        found = [entry for entry in entries if entry is not None]
        if len(found) < len(keys):
            return None
        parts = [self._load(entry) for entry in found]
        log_probs, tokens = (torch.cat(side) for side in zip(*parts, strict=True))
        return sv.SoftTargets(log_probs, tokens, temperature)

    def add(self, keys: Sequence[str], positions: Sequence[int], targets: sv.SoftTargets) -> None:
        """Write the predictions for rows that have these numbers of positions, and are not cached yet.

        Raises:
            StorageError: they cannot be written.
        """
        if targets.tokens is None:
            raise ConfigError("only targets with top_k are cached: set it below the size of the vocabulary")
        tokens = targets.tokens
        data, index = self._own.with_suffix(".bin"), self._own.with_suffix(".jsonl")
        with storage_errors(data):
            self.folder.mkdir(parents=True, exist_ok=True)
            with data.open("ab") as file, index.open("ab") as lines:
                rows = zip(
                    keys, targets.log_probs.cpu().split(positions), tokens.cpu().split(positions), strict=True
                )
                for key, probs, ids in rows:
                    if key in self._entries:
                        continue
                    offset = file.tell()
                    file.write(probs.numpy().astype("<f4").tobytes() + ids.numpy().astype("<i4").tobytes())
                    file.flush()  # a line in the index promises that its data are complete
                    entry = _Entry(data, offset, len(probs), ids.shape[1])
                    lines.write(json.dumps([key, *entry[1:]]).encode() + b"\n")
                    self._entries[key] = entry

    def size(self) -> tuple[int, int]:
        """Return the bytes and the rows of all workers' files."""
        self._refresh()
        size = sum(file.stat().st_size for file in self.folder.glob("*.*"))
        return size, len(self._entries)

    def _refresh(self) -> None:
        """Read what workers have added to their indices since the last call."""
        with storage_errors(self.folder, "read"):
            for file in self.folder.glob("*.jsonl"):
                for key, offset, positions, tokens in self._new_lines(file):
                    entry = _Entry(file.with_suffix(".bin"), offset, positions, tokens)
                    self._entries.setdefault(key, entry)

    def _new_lines(self, file: Path) -> Iterator[tuple[str, int, int, int]]:
        with file.open("rb") as lines:
            lines.seek(self._read_to.get(file, 0))
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written, or its writer was killed
                    return
                self._read_to[file] = self._read_to.get(file, 0) + len(line)
                yield json.loads(line)

    def _load(self, entry: _Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log probabilities (n, k + 1) and tokens (n, k)."""
        columns = entry.tokens + 1
        with storage_errors(entry.file, "read"), entry.file.open("rb") as file:
            file.seek(entry.offset)
            probs = np.frombuffer(file.read(4 * entry.positions * columns), "<f4")
            ids = np.frombuffer(file.read(4 * entry.positions * entry.tokens), "<i4")
        return (
            torch.from_numpy(probs.copy()).view(entry.positions, columns),
            torch.from_numpy(ids.astype(np.int64)).view(entry.positions, entry.tokens),
        )


def claim_cache(config: FinetuneConfig, folder: Path, rows: Sequence[TrainingRow]) -> str:
    """Empty a cache of another model, other rows or other settings; return a sentence about its size."""
    distillation, training = config.distillation, config.training
    settings = [distillation.temperature, distillation.top_k, training.precision, config.model.dtype]
    content = json.dumps([of_model(config.model.path), of_rows(rows), settings])
    digest, file = hashlib.sha256(content.encode()).hexdigest(), folder / "digest"
    if not file.exists() or file.read_text() != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(file, digest)
    each = bytes_per_row(config, rows)
    total = each * len(rows)
    return f"the teacher's predictions take about {each:,} bytes per row, {total:,} in all, in {folder}"


def bytes_per_row(config: FinetuneConfig, rows: Sequence[TrainingRow]) -> int:
    """Return the mean bytes of a row's predictions, estimated from the answers of the first rows."""
    form = ChatFormat(load_processor(config.model.path))
    sample = rows[:_SAMPLE]
    learnt = 0
    for row in sample:
        rendered = form.render(row.messages)
        answers = [rendered.text[start:end] for start, end in rendered.answers]
        ids = form.tokenizer(answers, add_special_tokens=False)["input_ids"]
        learnt += sum(map(len, ids))
    return round(learnt / max(len(sample), 1) * 4 * (2 * (config.distillation.top_k or 0) + 1))
