"""The rows of a captioning job: rows of the manifest, then rows of the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from pipelines.data.images import FileImage, InlineImage, ParquetImage, TarImage, TsvImage
from pipelines.data.rows import ImageSource, Message


@dataclass(frozen=True, slots=True)
class Problem:
    """The reason why a row has no caption: a kind, by which errors are counted, and a sentence.

    The kinds are those of `RejectKind`, and "duplicate key" (an earlier row has the key), "prompt" (processor
    or engine refuse the prompt), "generation" (an error while the answer was generated).
    """

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One input.

    Attributes:
        key: unique in the job.
        source: file and position of the row.
        messages: the last one is the user's; they contain one ``<image>`` for each of ``images``.
        images: where the images are.
        problem: the reason why the row cannot be captioned; its messages and images are then unusable.
    """

    key: str
    source: str
    messages: tuple[Message, ...] = ()
    images: tuple[ImageSource, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """One row of the result. An error row has a key, a model, an adapter and the error.

    ``prompt_tokens`` counts every visual token, as without Skip-Vision. ``visual_tokens_cached`` is the
    number of visual tokens and summaries in the KV cache. ``seconds`` is the time from the row's prefill to
    its last token. ``log_probability`` is the natural logarithm of the probability of the text, the end
    included; null unless ``sampling.logprobs`` is 0.
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
    log_probability: float | None = None
    model: str | None = None
    adapter: str | None = None
    error_kind: str | None = None
    error: str | None = None


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
CAPTION_SCHEMA = pa.schema(
    [pa.field(f.name, _TYPES[str(f.type).removesuffix(" | None")]) for f in fields(Caption)]
)
"""Columns and types of the files that hold the captions."""

_SOURCES = {
    "file": FileImage,
    "inline": InlineImage,
    "parquet": ParquetImage,
    "tar": TarImage,
    "tsv": TsvImage,
}
_KINDS = {source: kind for kind, source in _SOURCES.items()}
_FIELDS = {source: tuple(f.name for f in fields(source)) for source in _KINDS}
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
"""Columns of the manifest. An image is a struct of the fields of its `ImageSource`."""


def manifest_table(rows: Iterable[CaptionRow]) -> pa.Table:
    """Convert rows to a table of the manifest."""
    return pa.Table.from_pylist([_manifest_line(row) for row in rows], MANIFEST_SCHEMA)


def manifest_rows(table: pa.Table, max_pixels: int) -> list[CaptionRow]:
    """Convert a table of the manifest to rows. Images above ``max_pixels`` are refused when opened."""
    return [_row_of(line, max_pixels) for line in table.to_pylist()]


def caption_table(captions: Sequence[Caption]) -> pa.Table:
    """Convert captions to a table of the result."""
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
    # `asdict` copies the bytes of images, which takes longer than everything else.
    return {"kind": _KINDS[type(image)], **{name: getattr(image, name) for name in _FIELDS[type(image)]}}


def _row_of(line: dict[str, Any], max_pixels: int) -> CaptionRow:
    problem = Problem(line["error_kind"], line["error"]) if line["error_kind"] else None
    messages = tuple(Message(**message) for message in line["messages"])
    images = tuple(_image_of(image, max_pixels) for image in line["images"])
    return CaptionRow(line["key"], line["source"], messages, images, problem)


def _image_of(value: dict[str, Any], max_pixels: int) -> ImageSource:
    source = _SOURCES[value["kind"]]
    given = {name: value[name] for name in _FIELDS[source] if name != "max_pixels"}
    return source(**given, max_pixels=max_pixels)
