"""The folder of a captioning job, and the files of captions in it.

::

    <storage>/<name>/run.json            settings, summary of the listing, MLflow run, and finally the result
                     lock                held by the process that works on the job
                     manifest/           every row of the inputs, divided into shards
                     adapter/            the adapter, if it is from MLflow
                     attempts/           blocks of rows that engines work on
                     exported/           model and adapter merged for vLLM; removed when the job ends
                     captions/000000.parquet …    the result: one file per complete shard
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.caption.attempts import Attempts
from pipelines.caption.rows import CAPTION_SCHEMA, Caption, caption_table
from pipelines.engines.config import NATIVE_ENGINE, assume_native
from pipelines.shared.files import atomic
from pipelines.shared.folder import JobFolder

_COUNTED = (
    "prompt_tokens",
    "output_tokens",
    "visual_tokens",
    "visual_tokens_retained",
    "visual_tokens_skipped",
    "visual_tokens_cached",
)
FILES_AT_ONCE = 16
"""Files that `tally` reads at a time, because each one waits for the storage."""


class CaptionFolder(JobFolder):
    """Job ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = frozenset(
        {
            *("scaling", "storage", "max_error_fraction", "samples", "tracking", "sampling.logprobs"),
            *NATIVE_ENGINE,
        }
    )

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.captions = self.path / "captions"
        self.adapter = self.path / "adapter"
        self.exported = self.path / "exported"
        self.attempts = Attempts(self.path / "attempts")

    @property
    def manifest(self) -> Path:
        """Path of the manifest: a folder, or the one file of a job that an earlier version began."""
        earlier, manifest = self.path / "manifest.parquet", self.path / "manifest"
        return earlier if "listed" in self.state and not manifest.exists() else manifest

    def _read(self) -> dict[str, Any]:
        return assume_native(super()._read())

    @property
    def has_work(self) -> bool:
        return self.captions.exists() and any(self.captions.iterdir())


@dataclass
class Tally:
    """Sums over captions: rows, errors by kind, tokens by column."""

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Number of rows with an error."""
        return self.errors.total()

    def add(self, captions: pa.Table) -> None:
        """Add rows of ``CAPTION_SCHEMA``, or of its columns with errors and tokens."""
        self.rows += captions.num_rows
        for entry in pc.value_counts(captions["error_kind"].drop_null()).to_pylist():
            self.errors[entry["values"]] += entry["counts"]
        for name in _COUNTED:
            self.tokens[name] += pc.sum(captions[name]).as_py() or 0


class CaptionShards:
    """The files of captions, one per shard, in a folder."""

    def __init__(self, folder: Path, kind: Literal["parquet", "jsonl"]) -> None:
        self.folder, self.kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: int) -> Path:
        """Return the path of a shard's file, whether or not it exists."""
        return self.folder / f"{shard:06d}.{self.kind}"

    def clean(self) -> None:
        """Remove the incomplete files of a killed job."""
        for partial in self.folder.glob(".*.partial"):
            partial.unlink()

    def missing(self, shards: int) -> list[int]:
        """Return those of the first ``shards`` shards that have no file."""
        present = self._present(shards)
        return [shard for shard in range(shards) if not present[shard]]

    def _present(self, shards: int) -> bytearray:
        """Return a byte for each shard: whether it has a file."""
        present = bytearray(shards)
        with os.scandir(self.folder) as entries:  # far faster on network storage than one call per file
            for entry in entries:
                name, _, kind = entry.name.partition(".")
                if kind == self.kind and name.isdecimal() and int(name) < shards:
                    present[int(name)] = 1
        return present

    def write(self, shard: int, captions: Sequence[Caption]) -> None:
        """Write a shard's captions to its file, which appears complete or not at all."""
        with atomic(self.path(shard)) as partial, partial.open("wb") as file:
            if self.kind == "parquet":
                pq.write_table(caption_table(captions), file, compression="zstd")
            else:
                lines = (json.dumps(asdict(caption), ensure_ascii=False) for caption in captions)
                file.write("".join(f"{line}\n" for line in lines).encode())

    def read(self, shard: int, columns: Collection[str] | None = None) -> pa.Table:
        """Return the captions of a shard, at least with these columns; by default with all."""
        path = self.path(shard)
        if self.kind == "parquet":
            return pq.read_table(path, schema=_schema(columns))
        with path.open(encoding="utf-8") as lines:
            return pa.Table.from_pylist([json.loads(line) for line in lines], CAPTION_SCHEMA)

    def tally(self, shards: int) -> Tally:
        """Return the sums over those of the first ``shards`` shards that have a file."""
        tally = Tally()
        present = [shard for shard, there in enumerate(self._present(shards)) if there]
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            for begin in range(0, len(present), FILES_AT_ONCE):
                for table in pool.map(self._counts, present[begin : begin + FILES_AT_ONCE]):
                    tally.add(table)
        return tally

    def _counts(self, shard: int) -> pa.Table:
        return self.read(shard, ("error_kind", *_COUNTED))


def _schema(columns: Collection[str] | None) -> pa.Schema:
    return CAPTION_SCHEMA if columns is None else pa.schema([CAPTION_SCHEMA.field(name) for name in columns])
