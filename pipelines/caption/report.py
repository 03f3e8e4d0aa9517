"""The MLflow record of a captioning job: numbers, and a page of samples with images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby
from typing import Any

from PIL import Image

import skipvision as sv
from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionShards, Tally
from pipelines.caption.manifest import Manifest
from pipelines.caption.rows import CaptionRow
from pipelines.data.images import ImageError
from pipelines.tracking.run import Tracker

_THUMBNAIL = 128
_STYLE = (
    "body{font:14px sans-serif}td{vertical-align:top;padding:4px 12px;border-top:1px solid #ccc}"
    "small{color:#666}.error{color:#a00}"
)


def savings(model_config: Any, skip: sv.SkipConfig, tally: Tally) -> dict[str, float]:
    """Return costs divided by those with full tokens: predicted for the mean row, counted over all rows.

    ``kv_bytes_counted`` is about the keys and values of the prompts in the engine. Without captions the
    result is empty.
    """
    rows, tokens = tally.rows - tally.failed, tally.tokens
    if not rows or not tokens["visual_tokens"]:
        return {}
    text = tokens["prompt_tokens"] - tokens["visual_tokens"]
    predicted = sv.predict_cost(
        model_config,
        skip,
        text_tokens=round(text / rows),
        new_tokens=max(1, round(tokens["output_tokens"] / rows)),
        visual_tokens=round(tokens["visual_tokens"] / rows),
        training=False,
    ).ratio_to_full
    counted = (text + tokens["visual_tokens_cached"]) / tokens["prompt_tokens"]
    found = {"kv_bytes_counted": counted}
    if predicted is not None:
        found |= {
            "prefill_flops_predicted": predicted.prefill_flops,
            "decode_flops_predicted": predicted.decode_flops,
            "kv_bytes_predicted": predicted.kv_bytes,
        }
    return {name: round(value, 4) for name, value in found.items()}


def record(
    tracker: Tracker,
    result: Mapping[str, Any],
    engines: Mapping[str, float],
    manifest: Manifest,
    shards: CaptionShards,
    config: CaptionConfig,
) -> None:
    """Record the numbers of a finished job and the page of samples."""
    values = {
        "rows": result["rows"],
        "captioned": result["captioned"],
        "error_rows": result["rows"] - result["captioned"],
        "rows_per_second": result["rows_per_second"],
        "seconds": result["seconds"],
        **{f"errors/{kind}": count for kind, count in result["errors"].items()},
        **{f"tokens/{name}": count for name, count in result["tokens"].items()},
        **{f"ratio_to_full/{name}": value for name, value in result["savings"].items()},
        **engines,
    }
    tracker.metrics({name: float(value) for name, value in values.items()}, manifest.rows)
    if config.samples:
        tracker.text(sample_page(manifest, shards, config), "sample.html")


def sample_page(manifest: Manifest, shards: CaptionShards, config: CaptionConfig) -> str:
    """Return one self-contained HTML page with evenly spaced rows and their thumbnails."""
    lines = [_line(row, caption) for row, caption in _sample(manifest, shards, config)]
    head = f"<meta charset='utf-8'><title>{escape(config.name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>{head}<table>{''.join(lines)}</table>\n"


def _sample(
    manifest: Manifest, shards: CaptionShards, config: CaptionConfig
) -> Iterator[tuple[CaptionRow, dict[str, Any]]]:
    count = min(config.samples, manifest.rows)
    wanted = [i * manifest.rows // count for i in range(count)]
    for shard, numbers in groupby(wanted, lambda number: number // manifest.shard_rows):
        here = [number % manifest.shard_rows for number in numbers]
        rows = manifest.shard(shard, config.input.max_pixels)
        captions = shards.read(shard).take(here).to_pylist()
        yield from zip((rows[number] for number in here), captions, strict=True)


def _line(row: CaptionRow, caption: Mapping[str, Any]) -> str:
    prompt = escape(row.messages[-1].text) if row.messages else ""
    answer = (
        f"<span class=error>{escape(caption['error_kind'])}: {escape(caption['error'])}</span>"
        if caption["error_kind"]
        else escape(caption["text"] or "")
    )
    tokens = f"{caption['visual_tokens_cached']} of {caption['visual_tokens']} visual tokens cached"
    note = "" if caption["error_kind"] else f"<br><small>{tokens}</small>"
    images = "" if caption["error_kind"] else "".join(map(_thumbnail, row.images))
    return f"<tr><td>{images}<td>{escape(row.key)}<br><small>{prompt}</small><td>{answer}{note}"


def _thumbnail(source: Any) -> str:
    try:
        image: Image.Image = source.open()
    except ImageError:  # it was readable when it was captioned
        return ""
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"<img src='data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'>"
