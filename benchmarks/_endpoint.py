"""Shared by the endpoint benchmarks: an endpoint on its own local Ray, and clients with timed requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
import psutil
import ray
from ray import serve as ray_serve

from benchmarks import _measure
from pipelines.shapes.scenes import render, sample_scene
from serve.app import build
from serve.config import Proxy
from serve.deploy import start

ROOT = Path(__file__).parents[1]
MODEL = "shapes-llava"
PROMPT = "Describe the image."
SKIP = {"retained": 64, "skipped": 64}
FULL = {"retained": 1.0, "skipped": 0.0, "summary_tokens": 0}
_TRIES = 3
"""Attempts of the openai client by default."""


# ---------------------------------------------------------------------------------------- the endpoint


@contextmanager
def local_endpoint(*, proxy: Proxy = "ray", **settings: Any) -> Iterator[Endpoint]:
    """Run the application on a local Ray that ends with the ``with`` block.

    Args:
        proxy: as `ServeConfig.proxy`.
        settings: of `serve.app.build`, in addition to the model's.
    """
    # Workers get the same priority as the benchmark.
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=8,  # only Ray's bookkeeping; it limits no process
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={"env_vars": environment},
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        port = free_port()
        start("127.0.0.1", port, proxy)
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        endpoint.deploy(**settings)
        yield endpoint
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """Return a port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Endpoint:
    """A running endpoint, by its URL."""

    url: str

    def deploy(
        self,
        engine: Mapping[str, Any] | None = None,
        scaling: Mapping[str, Any] | None = None,
        adapters: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """Deploy the application, or redeploy it with other settings."""
        model = {
            "path": str(ROOT / "models" / MODEL),
            "name": MODEL,
            "dtype": "float32",
            "adapters": dict(adapters or {}),
            "skip": SKIP,
            "engine": {
                "max_sequences": 16,
                "kv_budget_bytes": 2**26,
                "prefix_cache_bytes": 0,
                **(engine or {}),
            },
            "scaling": {"cpus_per_engine": 0.5, **(scaling or {})},
        }
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray_serve.run(build({"models": [model], **settings}), name="skipvision", route_prefix="/")

    def statistics(self) -> Any:
        """Return the `Statistics` of one engine."""
        handle = ray_serve.get_deployment_handle(f"engine-{MODEL}", "skipvision")
        return handle.statistics.remote().result()

    def engines(self) -> int:
        """Return the number of running engines."""
        deployments = ray_serve.status().applications["skipvision"].deployments
        return int(deployments[f"engine-{MODEL}"].replica_states.get("RUNNING", 0))

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of this Ray whose title contains a text."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if title in " ".join(process.cmdline()[:1]):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    async def counted(self, session: aiohttp.ClientSession, name: str) -> float:
        """Return a counter's sum over all replicas, after the last of them has reported it."""
        await asyncio.sleep(1.5)
        async with session.get(f"{self.url}/metrics") as page:
            text = await page.text()
        values = re.findall(rf"^ray_skipvision_{name}_total(?:{{.*}})? (\S+)$", text, flags=re.MULTILINE)
        return sum(map(float, values))


# ----------------------------------------------------------------------------------------- the clients


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request.

    Attributes:
        kind: answered (completely); refused (4xx); failed (5xx, or a stream that ended with an error event);
            lost (no answer, or an incomplete one); left (the client disconnected).
        status: HTTP status; 0 = none.
        at: time of sending, from the start of the load (s).
        seconds: time to the end of the answer.
        first: time to the first token (s); streams only.
        tokens: number of tokens of the answer.
        again: number of retries by the client.
        stages: milliseconds by stage, as the endpoint reports them; only without streaming.
    """

    kind: Literal["answered", "refused", "failed", "lost", "left"]
    status: int = 0
    at: float = 0.0
    seconds: float = 0.0
    first: float | None = None
    tokens: int = 0
    again: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def between(self) -> float | None:
        """Mean seconds from one token to the next; None for fewer than two."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.seconds - self.first) / (self.tokens - 1)


def bodies(seed: int, **fields: Any) -> Iterator[dict[str, Any]]:
    """Yield endless request bodies, over 64 different images in turn."""
    images: list[str] = []
    for number in count():
        if number < 64:
            buffer = io.BytesIO()
            render(sample_scene(seed, "test", number)[0]).save(buffer, "PNG")
            images.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
        image = {"type": "image_url", "image_url": {"url": images[number % 64]}}
        content = [image, {"type": "text", "text": PROMPT}]
        yield {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


async def ask(
    session: aiohttp.ClientSession, endpoint: Endpoint, body: Mapping[str, Any], tries: int = _TRIES
) -> Outcome:
    """Send a request; retry after half a second if it failed before any text arrived."""
    begin = time.perf_counter()
    for again in range(tries):
        outcome = await _ask_once(session, f"{endpoint.url}/v1/chat/completions", body, begin)
        if outcome.kind not in ("failed", "lost") or outcome.first is not None:
            break
        if again < tries - 1:
            await asyncio.sleep(0.5)
    return replace(outcome, again=again)


async def _ask_once(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], begin: float
) -> Outcome:
    first: float | None = None
    status = 0
    try:
        async with session.post(url, json=body) as response:
            status = response.status
            if status != 200:
                await response.read()
                kind: Literal["refused", "failed"] = "refused" if status < 500 else "failed"
                return Outcome(kind, status, seconds=time.perf_counter() - begin)
            if not body.get("stream"):
                usage = (await response.json())["usage"]
                stages = _stages(response.headers["Server-Timing"])
                seconds = time.perf_counter() - begin
                return Outcome(
                    "answered", status, seconds=seconds, tokens=usage["completion_tokens"], stages=stages
                )
            tokens, ended, broken = 0, False, False
            async for line in response.content:
                text = line.decode().removeprefix("data: ").strip()
                ended = ended or text == "[DONE]"
                event = json.loads(text) if text.startswith("{") else {}
                broken = broken or "error" in event
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if first is None and any(
                    choice["delta"].get("content") for choice in event.get("choices", ())
                ):
                    first = time.perf_counter() - begin
            seconds = time.perf_counter() - begin
            return Outcome(
                "failed" if broken else "answered" if ended else "lost",
                status, seconds=seconds, first=first, tokens=tokens,
            )  # fmt: skip
    except (aiohttp.ClientError, TimeoutError, ConnectionError):
        return Outcome("lost", status, seconds=time.perf_counter() - begin, first=first)


def _stages(header: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", header)}


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the arrival times of a Poisson process (s)."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(2 * rate * seconds) + 20)
    return [float(time) for time in np.cumsum(gaps) if time < seconds]


async def offered(times: Sequence[float], send: Callable[[int], Any]) -> list[Outcome]:
    """Send each request at its time, without waiting for earlier ones; return all outcomes."""
    begin = time.perf_counter()

    async def at(moment: float, number: int) -> Outcome:
        await asyncio.sleep(max(begin + moment - time.perf_counter(), 0.0))
        return replace(await send(number), at=moment)

    return list(await asyncio.gather(*(at(moment, number) for number, moment in enumerate(times))))


def session(keep: bool = False) -> aiohttp.ClientSession:
    """Open a client session with unlimited connections and a timeout of 90 s.

    ``keep`` reuses connections. A killed process may have cut a reused one, and its next request would count
    as lost.
    """
    connector = aiohttp.TCPConnector(limit=0, force_close=not keep)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=90))


def tally(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Count the outcomes of each kind."""
    kinds = ("answered", "refused", "failed", "lost", "left")
    return {kind: sum(outcome.kind == kind for outcome in outcomes) for kind in kinds}


def machine(load: float) -> str:
    """Describe the machine; ``load`` is the load average before the measurement."""
    loads = f"load average {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    return (
        f"{_measure.today()}; {_measure.processor()}; {_measure.versions()}, ray {ray.__version__}; {loads}"
    )
