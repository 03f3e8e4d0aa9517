"""What travels through a captioning job: a row of the manifest, then a row of the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from pipelines.data.images import FileImage, InlineImage, ParquetImage, TarImage, TsvImage
from pipelines.data.rows import ImageSource, Message


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row gets no caption: what it is counted as, and a sentence for the data set's owner.

    The kinds are those of `RejectKind`, and "duplicate key" (an earlier row has it), "prompt" (processor or
    engine refuse it), "generation" (it failed while its answer was written).
    """

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One input: its unique key, what is asked, and where its images are.

    ``messages`` ends with a user's and holds one ``<image>`` for each of ``images``. ``source`` says where
    the row stands. A row with a ``problem`` has neither messages nor images that could be used.
    """

    key: str
    source: str
    messages: tuple[Message, ...] = ()
    images: tuple[ImageSource, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """One row of the result; columns of a row with an error are null as far as there is nothing to say.

    ``prompt_tokens`` counts every visual token, as without Skip-Vision; ``visual_tokens_cached`` is how
    many of ``visual_tokens`` (summaries included) the KV cache held. ``seconds`` run from the row's prefill
    to its last token.
    """

    key: str
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    visual_tokens: int | None = None
    visual_tokens_retained: int | None = None
    visual_tokens_skipped: int | None = None
    visual_tokens_cached: int | None = None
    seconds: float | None = None
    model: str | None = None
    adapter: str | None = None
    error_kind: str | None = None
    error: str | None = None


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
CAPTION_SCHEMA = pa.schema(
    [pa.field(f.name, _TYPES[str(f.type).removesuffix(" | None")]) for f in fields(Caption)]
)
"""Columns of the result."""

_SOURCES = {
    "file": FileImage,
    "inline": InlineImage,
    "parquet": ParquetImage,
    "tar": TarImage,
    "tsv": TsvImage,
}
_KINDS = {source: kind for kind, source in _SOURCES.items()}
_IMAGE = pa.struct(
    [
        ("kind", pa.string()),
        *((name, pa.string()) for name in ("path", "name", "column", "member")),
        *((name, pa.int64()) for name in ("row_group", "row", "index", "offset", "size")),
        ("data", pa.binary()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ("images", pa.list_(_IMAGE)),
        ("error_kind", pa.string()),
        ("error", pa.string()),
    ]
)
"""Columns of the manifest; an image is the fields of its `ImageSource`."""


def manifest_table(rows: Iterable[CaptionRow]) -> pa.Table:
    """Rows as they are written to the manifest."""
    return pa.Table.from_pylist([_manifest_line(row) for row in rows], MANIFEST_SCHEMA)


def manifest_rows(table: pa.Table, max_pixels: int) -> list[CaptionRow]:
    """Inverse of `manifest_table`; images above ``max_pixels`` will be refused when they are opened."""
    return [_row_of(line, max_pixels) for line in table.to_pylist()]


def caption_table(captions: Sequence[Caption]) -> pa.Table:
    """Captions as they are written to the result."""
    columns = {name: [getattr(caption, name) for caption in captions] for name in CAPTION_SCHEMA.names}
    return pa.table(columns, CAPTION_SCHEMA)


def _manifest_line(row: CaptionRow) -> dict[str, Any]:
    return {
        "key": row.key,
        "source": row.source,
        "messages": [{"role": message.role, "text": message.text} for message in row.messages],
        "images": [_image_line(image) for image in row.images],
        "error_kind": row.problem and row.problem.kind,
        "error": row.problem and row.problem.reason,
    }


def _image_line(image: Any) -> dict[str, Any]:
    # `asdict` would copy bytes, and takes longer than all the rest.
    return {"kind": _KINDS[type(image)], **{f.name: getattr(image, f.name) for f in fields(image)}}


def _row_of(line: dict[str, Any], max_pixels: int) -> CaptionRow:
    problem = Problem(line["error_kind"], line["error"]) if line["error_kind"] else None
    messages = tuple(Message(**message) for message in line["messages"])
    images = tuple(_image_of(image, max_pixels) for image in line["images"])
    return CaptionRow(line["key"], line["source"], messages, images, problem)


def _image_of(value: dict[str, Any], max_pixels: int) -> ImageSource:
    source = _SOURCES[value["kind"]]
    given = {field.name: value[field.name] for field in fields(source) if field.name != "max_pixels"}
    return source(**given, max_pixels=max_pixels)
