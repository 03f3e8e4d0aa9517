"""Measured costs of a captioning job and of the endpoint, per row, block, shard and request."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import _measure
from benchmarks.gpu import GEOMETRIES
from pipelines.caption.attempts import Attempts
from pipelines.caption.config import CaptionConfig, InputSection, ScalingSection
from pipelines.caption.folder import CaptionShards
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.caption.rows import Caption
from pipelines.caption.stream import packed, streamed

SHARD = CaptionConfig.model_fields["output"].default.shard_rows


def job(rows: int) -> dict[str, float]:
    """Measure everything of a job's driver but Ray, for a number of rows with tiny payloads.

    The peak of memory is that of this process, so this needs one of its own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder / "rows.jsonl", rows)
        settings = InputSection(source=str(folder / "rows.jsonl"), image_root="/images")
        _write_rows(folder / "few.jsonl", 1000)
        few = settings.model_copy(update={"source": str(folder / "few.jsonl")})
        write_manifest(few, folder / "few", SHARD, _silent)  # imports and caches
        before = peak()
        listing = seconds(lambda: write_manifest(settings, folder / "manifest", SHARD, _silent))
        opening = seconds(lambda: Manifest(folder / "manifest"))
        manifest = Manifest(folder / "manifest")
        last = min(seconds(lambda: manifest.shard(manifest.shards - 1, 10**6)) for _ in range(3))
        shards = CaptionShards(folder / "captions", "parquet")
        captions = [_caption(number) for number in range(SHARD)]
        writing = min(seconds(lambda: shards.write(0, captions)) for _ in range(3))
        for shard in range(1, manifest.shards):
            os.link(shards.path(0), shards.path(shard))
        missing = seconds(lambda: shards.missing(manifest.shards))
        tally = seconds(lambda: shards.tally(manifest.shards))
        return {
            "rows": rows,
            "listing": listing / rows,
            "opening": opening,
            "shard": last,
            "writing": writing / SHARD,
            "missing": missing / manifest.shards,
            "tally": tally / rows,
            "memory": peak() - before,
            "manifest_bytes": sum(file.stat().st_size for file in (folder / "manifest").iterdir()) / rows,
            "caption_bytes": shards.path(0).stat().st_size / SHARD,
        }


def _write_rows(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for number in range(rows):
            row = {"id": f"row-{number:09d}", "image": f"{number % 1000:03d}/{number:09d}.jpg"}
            file.write(f"{json.dumps(row)}\n")


def _caption(number: int) -> Caption:
    words = ("a", "dog", "red", "table", "of", "the", "man", "street", "two", "on", "with", "tall")
    text = " ".join(words[(number * 7 + step * step) % len(words)] for step in range(64))
    counts = (640, 64, 576, 144, 144, 160)
    return Caption(f"row-{number:09d}", text, "stop", *counts, seconds=4.2, model="llava", adapter="adapter")


def _silent(_: str) -> None:
    pass


# ------------------------------------------------------------------------------------------ Ray Data


class Same:
    """An engine that returns its block."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        return batch


def _forty_blocks(batch: pa.Table) -> Iterator[pa.Table]:
    return (packed((batch["shard"][0].as_py(), number)) for number in range(40))


def blocks(count: int) -> dict[str, float]:
    """Stream blocks with tiny payloads through Ray Data, and measure time and memory of the job for each.

    The first quarter allocates what every stream needs. The memory of a block is the slope over the rest, and
    over each half of it: that of few blocks is noise.
    """
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
    )
    try:
        scaling = ScalingSection(workers=1, readers=1)
        shards, resources = range(-(-count // 40)), {"CPU": 1, "GPU": 0}
        stream = streamed(shards, _forty_blocks, (Same, None), scaling, resources, 12)
        for _ in itertools.islice(stream, count // 4):
            pass
        begin, every = time.process_time(), max(1, count // 400)
        memory: list[int] = []
        for number, _ in enumerate(stream):
            if number % every == 0:
                memory.append(allocated())
        half = len(memory) // 2
        return {
            "blocks": count,
            "seconds": (time.process_time() - begin) / (number + 1),
            "bytes": _slope(memory) / every,
            "bytes_first": _slope(memory[:half]) / every,
            "bytes_last": _slope(memory[half:]) / every,
        }
    finally:
        ray.shutdown()


def _slope(values: Sequence[float]) -> float:
    """Return the slope of a line through equidistant values, by least squares."""
    return statistics.linear_regression(range(len(values)), values).slope


# ---------------------------------------------------------------------------------- images and files


def image() -> dict[str, float]:
    """Measure one image on its way to an engine: open, convert to pixels, put into a block."""
    import numpy as np
    import safetensors.torch
    import torch
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    noise = np.random.default_rng(0).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    opened = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = processor(opened, return_tensors="pt")["pixel_values"]
    return {
        "file": len(data),
        "open": repeated(lambda: Image.open(io.BytesIO(data)).convert("RGB")),
        "prepare": repeated(lambda: processor(opened, return_tensors="pt")),
        "pack": repeated(lambda: packed(safetensors.torch.save({"pixel_values": pixels}))),
        "bytes": pixels.numel() * pixels.element_size(),
    }


def attempts() -> float:
    """Measure the two operations on files for each block of an engine (s)."""
    with tempfile.TemporaryDirectory() as name:
        counted = Attempts(Path(name) / "attempts")

        def one() -> None:
            counted.begin("0-0")
            counted.end("0-0")

        return repeated(one)


def checkpoint() -> int:
    """Return the bytes of a checkpoint: LoRA of rank 16 on LLaVA-1.5-7B, with AdamW's two moments."""
    size = GEOMETRIES["llava-1.5-7b"]
    square, wide = size.hidden + size.hidden, size.hidden + size.intermediate
    return size.layers * 16 * (4 * square + 3 * wide) * 4 * 3


# ------------------------------------------------------------------------------------------ endpoint


def endpoint(requests: int) -> dict[str, float]:
    """Measure the CPU seconds of proxy, ingress and engine's process for a request, and its bytes."""
    from benchmarks import _endpoint

    titles = {"proxy": "ProxyActor", "ingress": ":ingress", "engine": ":engine", "controller": "Controller"}
    with _endpoint.local_endpoint() as running:
        size = len(json.dumps(next(_endpoint.bodies(0))))

        async def send(count: int) -> None:
            bodies = _endpoint.bodies(0, max_tokens=8)
            async with _endpoint.session(keep=True) as session:  # eight at a time
                for _ in range(max(1, count // 8)):
                    sent = (_endpoint.ask(session, running, body) for body in itertools.islice(bodies, 8))
                    for outcome in await asyncio.gather(*sent):
                        if outcome.kind != "answered":
                            raise SystemExit(f"a request was {outcome.kind}")

        def used() -> dict[str, float]:
            return {
                role: sum(sum(process.cpu_times()[:2]) for process in running.processes(title))
                for role, title in titles.items()
            }

        asyncio.run(send(8))
        before = used()
        asyncio.run(send(requests))
        after = used()
    return {role: (after[role] - before[role]) / requests for role in titles} | {"body": size}


# ------------------------------------------------------------------------------------------ measures


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of one call in this process, which other work on the machine hardly changes."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def repeated(call: Callable[[], Any], times: int = 15) -> float:
    """Return the median CPU seconds of several calls."""
    return _measure.Spread.of([seconds(call) for _ in range(times)]).median


def allocated() -> int:
    """Return the bytes of this process in memory, without pages of files, which the kernel drops at will."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def peak() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
