"""Find the first bottleneck of a captioning job and of an endpoint at each power of ten.

    python -m benchmarks.scale --out docs/benchmarks/scale.md

Each cost is measured on this machine in CPU seconds, with tiny payloads where only their number matters. GPUs
are sized by `skipvision.cost` from data sheets, and the wait for a file of the shared folder is assumed. Then
arithmetic: how much of each limit a job of 10³ to 10⁹ images takes, and an endpoint of 1 to 10⁵ requests/s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import skipvision as sv
from benchmarks import _measure, _scale
from benchmarks.gpu import GEOMETRIES
from pipelines.caption.config import ScalingSection
from pipelines.caption.folder import FILES_AT_ONCE
from pipelines.caption.stages import BLOCKS_AT_ONCE
from skipvision.cost.sizing import GPUS, Workload, demand, size

DAY = 86_400
BLOCK_ROWS = 16
"""Rows of a block with 64 sequences at once: see `pipelines.caption.stages`."""
READERS, THREADS = 4, ScalingSection.model_fields["threads_per_reader"].default
"""Readers for each GPU, as in the overlay `gpu` of infra/kuberay, and the files that each opens at once."""
BLOCKS_HELD = BLOCKS_AT_ONCE + 2 + 2 * READERS
"""Blocks in the object store for each engine: those it has been given, two that Ray Data has ready, and two
of each reader."""
BLOCK_BYTES = 50.0
"""Bytes of the driver for each block of Ray Data, to plan with: more than a run over 10⁵ blocks gave.

A run over a few thousand gives noise.
"""
OBJECT_STORE = 0.5 * 0.3 * 48 * 2**30
"""Bytes that Ray Data may use of a GPU pod's object store: half of it, which is 30 % of the pod's memory."""
INGRESS_SHARE = 0.7
"""Share of its CPU that each ingress may use, for the number of ingresses."""
EARLIER = {"block_bytes": 4_100.0, "row_bytes": 44.0, "footer_bytes": 1_750.0, "tally": 2.0}
"""Costs of the version before, as they were measured in the same way then. They are not measured again.

Bytes of the driver for each block (Ray Data's statistics) and row (hashes of keys, and their sorted copy);
bytes of metadata for each shard of the manifest, which every reader parses for every shard; seconds of
`tally` as a multiple of today's, for a start and once more for the end.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.measure:
        print(json.dumps(getattr(_scale, options.measure)(options.count)))
        return
    load = os.getloadavg()[0]
    parts: list[str] = []
    if {"driver", "arithmetic"} & {*options.parts}:
        jobs = [_apart("job", rows) for rows in options.rows]
        parts.append(f"### A job's driver, tiny payloads, {_scale.SHARD:,} rows a shard\n\n{_driver(jobs)}")
    if {"blocks", "arithmetic"} & {*options.parts}:
        block = _apart("blocks", options.blocks)
    if "blocks" in options.parts:
        parts.append(f"### Blocks through Ray Data, in the driver\n\n{_blocks(block)}")
    if "arithmetic" in options.parts:
        request = _apart("endpoint", options.requests)
        wait = options.file_wait_ms / 1e3
        costs = Costs(jobs[-1], block, _scale.image(), request, _scale.attempts(), options.gpu, wait)
        parts += [
            f"### Costs of one\n\n{costs.table()}",
            f"### A captioning job in a day\n\n{_captioning(costs)}",
            f"### An endpoint\n\n{_serving(costs)}",
        ]
    command = "python -m benchmarks.scale " + " ".join(arguments or sys.argv[1:])
    machine = f"{_measure.today()}; {_measure.processor()}; {_measure.versions()}"
    text = "\n\n".join(
        [
            f"`{command.strip()}`",
            f"{machine}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after.",
            *parts,
        ]
    )
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _apart(what: str, count: int) -> Any:
    """Measure in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.scale", "--measure", what, "--count", str(count)]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@dataclass(frozen=True)
class Costs:
    """Measured costs: of a job without Ray, a block, an image, a request, and a block's files (s, bytes).

    ``wait`` is the time until a file of the shared folder is open or written (s), an assumption.
    """

    job: dict[str, float]
    block: dict[str, float]
    image: dict[str, float]
    request: dict[str, float]
    attempts: float
    gpu: str
    wait: float

    @property
    def reading(self) -> float:
        """CPU seconds of a reader for an image."""
        return self.image["open"] + self.image["prepare"] + self.image["pack"]

    @property
    def held(self) -> float:
        """Bytes of the object store for each engine."""
        return BLOCKS_HELD * BLOCK_ROWS * self.image["bytes"]

    @property
    def engine(self) -> float:
        """Seconds of a GPU for an image."""
        work = Workload(1)
        model = GEOMETRIES["llava-1.5-7b"].config()
        model.dtype = torch.bfloat16
        sized = size(demand(model, sv.SkipConfig(retained=0.25, skipped=0.25), work), GPUS[self.gpu], work)
        if sized is None:
            raise SystemExit(f"LLaVA-1.5-7B does not fit into one {self.gpu}")
        return 1 / sized.images_per_second

    def table(self) -> str:
        """Format the costs as a table."""
        rows = [
            ("image: open a JPEG of 640 × 480", _ms(self.image["open"])),
            ("image: to the model's pixels (336 × 336)", _ms(self.image["prepare"])),
            ("image: into a block", _ms(self.image["pack"])),
            ("image: bytes in the object store", f"{self.image['bytes'] / 1e6:.2f} MB"),
            ("engine: bytes of its blocks in the object store", f"{self.held / 1e6:,.0f} MB"),
            ("file: wait of the shared folder (assumed)", _ms(self.wait)),
            (f"image: prefill and decode on one {self.gpu} (predicted)", _ms(self.engine)),
            ("row: listing", _us(self.job["listing"])),
            ("row: writing its caption", _us(self.job["writing"])),
            ("row: counting its caption at a later start", _us(self.job["tally"])),
            (
                "row: manifest, caption",
                f"{self.job['manifest_bytes']:.0f} + {self.job['caption_bytes']:.0f} B",
            ),
            ("block: Ray Data, the driver's time", _ms(self.block["seconds"])),
            ("block: Ray Data, the driver's memory (planned)", f"{BLOCK_BYTES:,.0f} B"),
            ("driver: memory without Ray Data", f"{self.job['memory'] / 2**20:.0f} MiB"),
            ("block: its file of attempts", _ms(self.attempts)),
            ("shard: reading its manifest", _ms(self.job["shard"])),
            ("request: CPU of the proxy", _ms(self.request["proxy"])),
            ("request: CPU of the ingress", _ms(self.request["ingress"])),
            ("checkpoint of fine-tuning: LoRA of rank 16, 7B", f"{_scale.checkpoint() / 1e6:.0f} MB"),
        ]
        return _measure.table(["cost", "measured"], rows)


def _driver(jobs: Sequence[dict[str, float]]) -> str:
    head = ["rows", "listing µs/row", "open manifest ms", "read last shard ms", "missing µs/shard"]
    head += ["count finished µs/row", "memory above start MiB"]
    rows = [
        [
            f"{job['rows']:,}",
            f"{1e6 * job['listing']:.0f}",
            f"{1e3 * job['opening']:.1f}",
            f"{1e3 * job['shard']:.0f}",
            f"{1e6 * job['missing']:.1f}",
            f"{1e6 * job['tally']:.2f}",
            f"{job['memory'] / 2**20:.0f}",
        ]
        for job in jobs
    ]
    return _measure.table(head, rows)


def _blocks(block: dict[str, float]) -> str:
    head = ["blocks", "time ms/block", "memory B/block", "in the first half", "in the second half", "planned"]
    slopes = [f"{block[name]:.0f}" for name in ("bytes", "bytes_first", "bytes_last")]
    row = [f"{block['blocks']:,}", f"{1e3 * block['seconds']:.2f}", *slopes, f"{BLOCK_BYTES:.0f}"]
    return _measure.table(head, [row])


# ----------------------------------------------------------------------------------------- captioning


def _captioning(costs: Costs) -> str:
    """Format the first bottlenecks of jobs that may take a day."""
    head = ["images", "GPUs", "hours", "before", "today", "what lifts today's"]
    rows = []
    for power in range(3, 10):
        images = 10**power
        gpus = max(1, math.ceil(images * costs.engine / DAY))
        time = images * costs.engine / gpus
        before, now = (_limits(costs, images, gpus, time, earlier=old) for old in (True, False))
        rows.append(
            [
                f"10^{power}",
                str(gpus),
                f"{time / 3600:.2g}",
                _first(before),
                _first(now),
                LIFTED[max(now, key=lambda name: now[name])] if max(now.values()) > 1 else "",
            ]
        )
    return _measure.table(head, rows)


LIFTED = {
    "listing": "parquet inputs in several jobs",
    "driver's time": "larger blocks (`engine.max_sequences`), or several jobs over parts of the inputs",
    "driver's memory": "several jobs over parts of the inputs",
    "manifest's metadata": "larger `output.shard_rows`",
    "restart": "larger `output.shard_rows`",
    "files in a folder": "larger `output.shard_rows`",
    "readers' CPUs": "`scaling.readers`, on nodes with more CPUs",
    "readers' waits": "`scaling.threads_per_reader`",
    "object store": "pods with more memory, fewer `scaling.readers`",
    "network between nodes": "readers on the engines' nodes",
    "shared folder": "inputs in an object store",
    "ingress' CPU": "more `ingresses`",
    "proxies' CPU": "a proxy on every node and a load balancer; HAProxy",
    "Serve's controller": "several endpoints with a load balancer",
    "clients' network": "URLs instead of base64, a load balancer",
    "MLflow": "a longer `adapter_poll_s`",
}


def _limits(costs: Costs, images: int, gpus: int, time: float, *, earlier: bool) -> dict[str, float]:
    """Return the share of each limit that a job takes, by name."""
    blocks, shards = images / BLOCK_ROWS, max(1.0, images / _scale.SHARD)
    block_bytes = EARLIER["block_bytes"] if earlier else BLOCK_BYTES
    memory = block_bytes * blocks + (EARLIER["row_bytes"] * images if earlier else costs.job["memory"])
    parsed = EARLIER["footer_bytes"] * (shards if earlier else min(shards, 100))
    tally = costs.job["tally"] * images * (2 * EARLIER["tally"] if earlier else 1)
    tally += costs.wait * shards * (2 if earlier else 1 / FILES_AT_ONCE)
    driver = costs.block["seconds"] * blocks + costs.job["writing"] * images + 2 * costs.wait * shards
    reading = (costs.reading + costs.wait) / (READERS * THREADS)
    return {
        "listing": costs.job["listing"] * images / (0.2 * DAY),  # a fifth of a day
        "driver's time": driver / time,
        "driver's memory": memory / 6e9,  # of a head with 8 GiB
        # 100 MB/s, 5 % of a shard's time
        "manifest's metadata": (parsed / 100e6 + costs.wait) / (0.05 * _scale.SHARD * costs.engine),
        "restart": tally / 600,  # ten minutes
        "files in a folder": shards / 1e6,
        "readers' CPUs": costs.reading / costs.engine / 7,  # of a worker with 8, for each GPU
        "readers' waits": reading / costs.engine,
        "object store": costs.held / OBJECT_STORE,
        "network between nodes": costs.image["bytes"] / costs.engine / 1.25e9,  # 10 Gbit/s for each GPU
        "shared folder": costs.image["file"] * images / time / 5e9,  # 5 GB/s
    }


def _first(shares: dict[str, float]) -> str:
    """Name the limit that is reached first; the job is bound by its GPUs if none is."""
    name = max(shares, key=lambda one: shares[one])
    if shares[name] <= 1:
        return f"GPUs (next: {name}, {shares[name]:.2g})"
    return f"**{name}**, {shares[name]:,.1f} × its limit"


# ------------------------------------------------------------------------------------------- serving


def _serving(costs: Costs) -> str:
    """Format the first bottlenecks of endpoints: by default, and with more ingresses and proxies."""
    head = ["requests/s", "GPUs", "before: one ingress and proxy", "`ingresses`", "proxies", "after"]
    rows = []
    for power in range(6):
        rate = 10**power
        gpus = math.ceil(rate * costs.engine)
        proxies = math.ceil(gpus / 8)  # one on each node with 8 GPUs
        ingresses = math.ceil(rate * costs.request["ingress"] / INGRESS_SHARE)
        before, after = (_loads(costs, rate, gpus, *fronts) for fronts in ((1, 1), (ingresses, proxies)))
        lifted = LIFTED[max(after, key=lambda name: after[name])] if max(after.values()) > 1 else ""
        rows.append(
            [
                f"10^{power}",
                f"{gpus:,}",
                _first(before),
                f"{ingresses:,}",
                f"{proxies:,}",
                _first(after),
                lifted,
            ]
        )
    return _measure.table([*head, "what lifts that"], rows)


def _loads(costs: Costs, rate: int, gpus: int, ingresses: int, proxies: int) -> dict[str, float]:
    request = costs.request
    return {
        "ingress' CPU": rate * request["ingress"] / ingresses,
        "proxies' CPU": rate * request["proxy"] / proxies,
        "clients' network": rate * costs.image["file"] * 4 / 3 / proxies / 1.25e9,  # 10 Gbit/s, base64
        "Serve's controller": gpus / 2_000,  # replicas that report to one controller, an assumption
        "MLflow": gpus / 30 / 100,  # each engine polls every 30 s; 100 answers/s, an assumption
    }


def _ms(value: float) -> str:
    return f"{1e3 * value:.2f} ms"


def _us(value: float) -> str:
    return f"{1e6 * value:.1f} µs"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    rows = [10**3, 10**4, 10**5, 10**6]
    both, parts = ["driver", "arithmetic"], ["driver", "blocks", "arithmetic"]
    add(
        "--parts",
        choices=parts,
        nargs="+",
        default=both,
        help="tables to print (default: driver, arithmetic)",
    )
    add("--rows", type=int, nargs="+", default=rows, help="sizes of the manifest (default: 10^3 to 10^6)")
    add("--blocks", type=int, default=6000, help="blocks through Ray Data (default: %(default)s)")
    add("--requests", type=int, default=160, help="requests to the endpoint (default: %(default)s)")
    add("--gpu", choices=list(GPUS), default="l40s", help="GPU of the arithmetic (default: %(default)s)")
    add(
        "--file-wait-ms",
        type=float,
        default=5.0,
        help="assumed wait for a file of the shared folder (default: %(default)s)",
    )
    add("--measure", choices=["job", "blocks", "endpoint"], help="measure only this, in this process")
    add("--count", type=int, default=1000, help="rows, blocks or requests of --measure")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="table", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
