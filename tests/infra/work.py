"""Settings of small jobs, which several tests of infra/ run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def images_of(data: Path) -> list[Path]:
    """The image files of a shapes data set."""
    return sorted((data / "images").rglob("*.png"))


def captioning(
    folder: Path, model: Path, images: Sequence[Path], rows: int, *, name: str = "captions", **sections: Any
) -> dict[str, Any]:
    """Settings that caption ``rows`` rows over the images in turn, with keys row-0, row-1 …"""
    source = folder / f"{name}.jsonl"
    table = [{"id": f"row-{number}", "image": str(images[number % len(images)])} for number in range(rows)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in table))
    return {
        "name": name,
        "storage": str(folder),
        "model": {"path": str(model)},
        "input": {"source": str(source)},
        "sampling": {"max_new_tokens": 32},
        "engine": {"max_sequences": 4},
        "output": {"shard_rows": 10},
        **sections,
    }


def fine_tuning(
    folder: Path, model: Path, data: Path, *, name: str = "tuned", **sections: Any
) -> dict[str, Any]:
    """Settings that fine-tune on a shapes data set, and register nothing."""
    return {
        "name": name,
        "storage": str(folder),
        "model": {"path": str(model)},
        "data": {"train": str(data / "train.json")},
        "tracking": {"registered_model": None, "system_metrics_seconds": 0},
        **sections,
    }
