"""Scored items: what a system answered to each item of a dataset, and how many points it got.

Scoring writes them; comparisons of systems read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from skipvision.errors import DataError


@dataclass(frozen=True)
class Item:
    """One item of a dataset as one system answered it.

    ``index`` names the item within ``dataset``. ``category`` is its slice. Items of one ``group`` (about the
    same image, say) are not independent: whoever resamples, resamples groups. ``score`` is a fraction of
    the item's points, 0 … 1. ``error`` says why there is no prediction; the score is 0 then.
    """

    dataset: str
    index: str
    system: str
    category: str
    group: str
    prediction: str
    score: float
    error: str | None = None


ITEM_SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.float64() if field.name == "score" else pa.string(), field.name == "error")
        for field in fields(Item)
    ]
)
"""Columns of a file of items; only ``error`` may be null."""


OVERALL = "overall"
"""The slice of all items."""

_MADE_BY = b"systems"


def write_items(
    path: Path, items: Sequence[Item], systems: Mapping[str, Mapping[str, str | None]] | None = None
) -> None:
    """Write items as parquet; an older file is replaced at once or not at all.

    ``systems`` says of each label what it stands for: ``model``, ``adapter`` (a registered version as
    ``models:/NAME/VERSION``, or a folder and the digest of its files, or None) and ``skip`` (JSON); and how
    it was asked: ``weights`` (fingerprint of the base model), ``sampling`` (JSON), ``judge``, and for each
    dataset ``dataset NAME`` (its fingerprint).
    """
    columns = {name: [getattr(item, name) for item in items] for name in ITEM_SCHEMA.names}
    made_by = {_MADE_BY: json.dumps(systems or {}, sort_keys=True).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(columns, ITEM_SCHEMA.with_metadata(made_by)), partial, compression="zstd")
    partial.replace(path)


def read_items(path: Path) -> list[Item]:
    """The items of a file that `write_items` wrote; raises `DataError` if it is missing or another."""
    return [Item(**line) for line in _table(path).to_pylist()]


def read_systems(path: Path) -> dict[str, dict[str, str | None]]:
    """What the labels of a file of items stand for, as `write_items` was told; raises `DataError`."""
    systems: dict[str, dict[str, str | None]] = json.loads(
        (_table(path).schema.metadata or {}).get(_MADE_BY, b"{}")
    )
    return systems


def categories(text: str) -> list[str]:
    """The categories that a text lists with commas between them, as MM-Vet's and POPE's tables do."""
    return [name for name in map(str.strip, text.split(",")) if name]


def _table(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as scored items: {error}") from error
    if table.schema.names != ITEM_SCHEMA.names:
        raise DataError(
            f"{path} has the columns {table.schema.names}, not those of scored items: {ITEM_SCHEMA.names}"
        )
    return table
