"""Rounds in which engines answer the same requests in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._engines.processes import Worker
from benchmarks._engines.workload import prompt
from benchmarks._measure import answer_lengths

Record = dict[str, Any]
Pair = tuple[str, str]
"""Names of an engine and of its setting."""


def measure_rounds(
    workers: Mapping[Pair, Worker],
    folder: Path,
    *,
    concurrency: Sequence[int],
    requests: Callable[[int], int],
    repeats: int,
    seed: int,
) -> Iterator[Record]:
    """Measure each engine at each concurrency, several times. Every other round has the reverse order.

    Args:
        workers: the engines.
        folder: has the images.
        concurrency: numbers of clients.
        requests: number of requests of a run with this many clients.
        repeats: number of rounds.
        seed: of the answers' lengths.
    """
    for worker in workers.values():
        worker.run(_job(folder, min(4, *concurrency), 4, seed))
    for turn in range(repeats):
        for clients in concurrency:
            job = _job(folder, clients, requests(clients), seed)
            for pair in list(workers)[:: 1 if turn % 2 else -1]:
                yield _record(pair, turn, job, workers[pair])


def _job(folder: Path, concurrency: int, count: int, seed: int) -> Record:
    images = sorted((folder / "images").iterdir())
    requests = [
        (str(images[number % len(images)]), prompt(number), tokens)
        for number, tokens in enumerate(answer_lengths(count, seed))
    ]
    return {"concurrency": concurrency, "requests": requests}


def _record(pair: Pair, turn: int, job: Record, worker: Worker) -> Record:
    result = worker.run(job)
    answers = result["answers"]
    per_token = [(a["total"] - a["first"]) / (a["tokens"] - 1) for a in answers if a["tokens"] > 1]
    return {
        "part": "engines",
        "engine": pair[0],
        "setting": pair[1],
        "versions": worker.versions,
        "concurrency": job["concurrency"],
        "turn": turn,
        "requests": len(answers),
        "seconds": result["seconds"],
        "cpu_seconds": result["cpu_seconds"],
        "first_token": median(answer["first"] for answer in answers),
        "per_token": median(per_token),
        "peak_bytes": result["peak_bytes"],
    }
