"""Scored items: a system's prediction for each item of a dataset, and its score.

The scoring job writes them; comparisons of systems read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shared.files import atomic
from skipvision.errors import DataError
from skipvision.files import check_regular


@dataclass(frozen=True)
class Item:
    """One item of a dataset with the prediction of one system.

    Attributes:
        dataset: the name of the dataset.
        index: identifies the item within the dataset.
        system: the label of the system.
        category: the slices of the item, separated by commas.
        group: the same for items that are not independent, such as questions about one image. Resampling
            draws groups, not items.
        prediction: the system's answer.
        score: a fraction of the item's points, 0 … 1.
        error: why there is no prediction; the score is then 0.
        log_probability: natural logarithm of the probability that the system gave its answer, the end of the
            answer included; None = not measured. It may differ in the last digits between two runs, so
            comparisons of items ignore it.
    """

    dataset: str
    index: str
    system: str
    category: str
    group: str
    prediction: str
    score: float
    error: str | None = None
    log_probability: float | None = field(default=None, compare=False)

    @property
    def key(self) -> tuple[str, str]:
        """Dataset and index: what the items of two systems for one question share."""
        return self.dataset, self.index


_NUMBERS = ("score", "log_probability")
_OPTIONAL = ("error", "log_probability")
_LATER = "log_probability"
"""A column that files of earlier versions lack."""

ITEM_SCHEMA = pa.schema(
    [
        pa.field(one.name, pa.float64() if one.name in _NUMBERS else pa.string(), one.name in _OPTIONAL)
        for one in fields(Item)
    ]
)
"""The columns of a file of items; only ``error`` and ``log_probability`` may be null."""

OVERALL = "overall"
"""The name of the slice that contains all items."""

_SYSTEMS_KEY = b"systems"


def write_items(
    path: Path, items: Sequence[Item], systems: Mapping[str, Mapping[str, str | None]] | None = None
) -> None:
    """Write items as parquet. An existing file is replaced atomically.

    ``systems`` describes the system of each label: ``model``, ``adapter`` (a registered version as
    ``models:/NAME/VERSION``, a folder with the digest of its files, or None) and ``skip`` (JSON). It also
    describes how the system was evaluated: ``weights`` (the fingerprint of the base model), ``sampling``
    (JSON), ``judge``, and for each dataset ``dataset NAME`` (its fingerprint).
    """
    columns = {name: [getattr(item, name) for item in items] for name in ITEM_SCHEMA.names}
    metadata = {_SYSTEMS_KEY: json.dumps(systems or {}, sort_keys=True).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        pq.write_table(pa.table(columns, ITEM_SCHEMA.with_metadata(metadata)), partial, compression="zstd")


def read_items(path: Path) -> list[Item]:
    """Read a file that `write_items` wrote. Raise `DataError` if it is missing or has another format."""
    return [Item(**row) for row in _table(path).to_pylist()]


def read_systems(path: Path) -> dict[str, dict[str, str | None]]:
    """Read the descriptions of the systems from a file of items. Raise `DataError` as `read_items` does."""
    systems: dict[str, dict[str, str | None]] = json.loads(
        (_table(path).schema.metadata or {}).get(_SYSTEMS_KEY, b"{}")
    )
    return systems


def categories(text: str) -> list[str]:
    """Split a comma-separated list of categories, as the tables of MM-Vet and POPE contain it."""
    return [name for name in map(str.strip, text.split(",")) if name]


def _table(path: Path) -> pa.Table:
    try:
        check_regular(path)
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as scored items: {error}") from error
    if table.schema.names not in (ITEM_SCHEMA.names, [name for name in ITEM_SCHEMA.names if name != _LATER]):
        raise DataError(
            f"{path} has the columns {table.schema.names}, not those of scored items: {ITEM_SCHEMA.names}"
        )
    return table
