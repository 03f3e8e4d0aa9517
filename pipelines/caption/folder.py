"""The folder of a captioning job, and the files of captions in it.

::

    <storage>/<name>/run.json            settings, summary of the listing, MLflow run, and finally the result
                     lock                held by the process that works on the job
                     manifest.parquet    every row of the inputs; its row groups are the shards
                     adapter/            the adapter, if it is from MLflow
                     attempts/           blocks of rows that engines work on
                     exported/           model and adapter merged for vLLM; removed when the job ends
                     captions/000000.parquet …    the result: one file per complete shard
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
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


class CaptionFolder(JobFolder):
    """Job ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = frozenset(
        {"scaling", "storage", "max_error_fraction", "samples", "tracking", *NATIVE_ENGINE}
    )

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.manifest = self.path / "manifest.parquet"
        self.captions = self.path / "captions"
        self.adapter = self.path / "adapter"
        self.exported = self.path / "exported"
        self.attempts = Attempts(self.path / "attempts")

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

    def add(self, table: pa.Table) -> None:
        """Add the rows of one file."""
        self.rows += table.num_rows
        for entry in pc.value_counts(table["error_kind"].drop_null()).to_pylist():
            self.errors[entry["values"]] += entry["counts"]
        for name in _COUNTED:
            self.tokens[name] += pc.sum(table[name]).as_py() or 0


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
        """Return the shards without a file."""
        return [shard for shard in range(shards) if not self.path(shard).exists()]

    def write(self, shard: int, captions: Sequence[Caption]) -> None:
        """Write a shard's captions to its file, which appears complete or not at all."""
        with atomic(self.path(shard)) as partial, partial.open("wb") as file:
            if self.kind == "parquet":
                pq.write_table(caption_table(captions), file, compression="zstd")
            else:
                lines = (json.dumps(asdict(caption), ensure_ascii=False) for caption in captions)
                file.write("".join(f"{line}\n" for line in lines).encode())

    def read(self, shard: int) -> pa.Table:
        """Return the captions of a shard."""
        path = self.path(shard)
        if self.kind == "parquet":
            return pq.read_table(path, schema=CAPTION_SCHEMA)
        with path.open(encoding="utf-8") as lines:
            return pa.Table.from_pylist([json.loads(line) for line in lines], CAPTION_SCHEMA)

    def tables(self, shards: Sequence[int]) -> Iterator[pa.Table]:
        """Yield the captions of those shards that have a file."""
        return (self.read(shard) for shard in shards if self.path(shard).exists())
