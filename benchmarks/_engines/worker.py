"""A process with one engine: ``python -m benchmarks._engines.worker OPTIONS``, with options as JSON.

Each line of standard input is a job ``{"concurrency": C, "requests": [[image, prompt, tokens], …]}``. The
answer is a line of standard output: seconds in all, and to the first token and to the end of each request.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

Job = dict[str, Any]


class EngineUnderTest(Protocol):
    """One engine with one setting."""

    async def answer(self, image: str, prompt: str, tokens: int) -> float:
        """Generate exactly this many tokens; returns the time of the first (`time.perf_counter`)."""


def main() -> None:
    """Start the engine, and answer jobs until standard input ends."""
    options = json.loads(sys.argv[1])
    # Engines print on standard output.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(_serve(options, channel))
    channel.flush()
    os._exit(0)  # do not wait for an engine that takes long to end


async def _serve(options: Job, channel: Any) -> None:
    module = importlib.import_module(f"benchmarks._engines.{options['engine']}_engine")
    engine: EngineUnderTest = await module.start(options)
    _send(channel, {"versions": module.versions()})
    while line := await asyncio.to_thread(sys.stdin.readline):
        _send(channel, await _run(engine, json.loads(line)))


def _send(channel: Any, value: Job) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


async def _run(engine: EngineUnderTest, job: Job) -> Job:
    """Let this many clients send the requests; each waits for its answer before it sends the next."""
    begin = time.perf_counter()
    requests = iter(job["requests"])
    clients = [_client(engine, requests) for _ in range(job["concurrency"])]
    answers = [answer for answers in await asyncio.gather(*clients) for answer in answers]
    return {"seconds": time.perf_counter() - begin, "answers": answers}


async def _client(engine: EngineUnderTest, requests: Iterator[tuple[str, str, int]]) -> list[Job]:
    answers = []
    for image, prompt, tokens in requests:
        begin = time.perf_counter()
        first = await engine.answer(image, prompt, tokens)
        answers.append({"tokens": tokens, "first": first - begin, "total": time.perf_counter() - begin})
    return answers


if __name__ == "__main__":
    main()
