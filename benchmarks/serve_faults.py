"""Outcomes of requests to an endpoint in which something breaks.

    python -m benchmarks run serve_faults --out docs/benchmarks/serving.md --part faults

Two ingresses and two engines answer a steady stream of requests for an adapter from MLflow, half of them
streamed. Under that load a process is killed, or another fault occurs, twice. Clients retry as the openai
client does: at most twice, after half a second, if a request failed before any text arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from benchmarks import _endpoint, _measure
from benchmarks._endpoint import MODEL, PROMPT, SKIP, Endpoint, Outcome
from benchmarks._run import Run
from serve.config import Proxy

ADAPTER = "shapes"
LISTENS: dict[Proxy, str] = {"ray": "::ProxyActor", "haproxy": "haproxy"}
"""Titles of the processes that accept the clients' connections."""

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Load:
    """A steady stream of requests.

    Attributes:
        endpoint: receives the requests.
        session: of the clients.
        proxy: the endpoint's HTTP proxy.
        rate: requests per second.
        seconds: duration of each case.
        tokens: max tokens of each answer.
    """

    endpoint: Endpoint
    session: aiohttp.ClientSession
    proxy: Proxy
    rate: float
    seconds: float
    tokens: int

    async def during(
        self, fault: Callable[[], Awaitable[Any]] | None, send: Callable[..., Any] | None = None
    ) -> list[Outcome]:
        """Run one case and return the outcomes; the fault occurs after a third and after two thirds of it.

        ``send`` replaces `_endpoint.ask`.
        """
        requests = _endpoint.bodies(0, model=ADAPTER, max_tokens=self.tokens, skip=SKIP)

        async def one(number: int) -> Outcome:
            body = {**next(requests), **(STREAMED if number % 2 else {})}
            return await (send or _endpoint.ask)(self.session, self.endpoint, body)

        async def breaks() -> None:
            for _ in range(2):
                await asyncio.sleep(self.seconds / 3)
                if fault is not None:
                    await fault()

        times = _endpoint.arrivals(self.rate, self.seconds, seed=0)
        outcomes, _ = await asyncio.gather(_endpoint.offered(times, one), breaks())
        return outcomes

    async def settled(self) -> None:
        """Wait until all engines and ingresses run again and can be reached."""
        for _ in range(240):
            await asyncio.sleep(0.5)
            if not await asyncio.to_thread(_is_complete, self.endpoint, self.proxy):
                continue
            with contextlib.suppress(aiohttp.ClientError):
                async with self.session.get(f"{self.endpoint.url}/healthz") as response:
                    if response.status == 200:
                        return
        raise SystemExit("the endpoint did not recover within two minutes")


def _is_complete(endpoint: Endpoint, proxy: Proxy) -> bool:
    try:
        alive = [len(endpoint.processes(title)) for title in (":ingress", LISTENS[proxy])]
        return endpoint.engines() == 2 and alive == [2, 1]
    except Exception:  # the controller itself may have been killed
        return False


# ------------------------------------------------------------------------------------------ the faults


def killing(endpoint: Endpoint, title: str) -> Callable[[], Awaitable[None]]:
    """Return a fault that sends SIGKILL to one process of the endpoint, once it exists again."""

    async def kill() -> None:
        while not (running := endpoint.processes(title)):
            await asyncio.sleep(0.2)
        running[0].send_signal(signal.SIGKILL)

    return kill


def _narrow(address: Any) -> socket.socket:
    """Create a socket with small buffers at both ends; the sender's buffer grows with the segment size."""
    one = socket.socket(*address[:3])
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    return one


async def slow(session: aiohttp.ClientSession, endpoint: Endpoint, body: dict[str, Any]) -> Outcome:
    """Slowly read a stream larger than all buffers on its way. Other requests are sent as usual."""
    if not body.get("stream"):
        return await _endpoint.ask(session, endpoint, body)
    read, large = b"", {**body, "n": 6, "logprobs": True, "top_logprobs": 20}
    connector = aiohttp.TCPConnector(socket_factory=_narrow)
    async with (
        aiohttp.ClientSession(connector=connector, read_bufsize=1024) as narrow,
        narrow.post(f"{endpoint.url}/v1/chat/completions", json=large) as response,
    ):
        while piece := await response.content.read(4096):
            read += piece
            await asyncio.sleep(0.05)
    return Outcome("answered" if read.endswith(b"data: [DONE]\n\n") else "lost", response.status)


async def leaving(session: aiohttp.ClientSession, endpoint: Endpoint, body: dict[str, Any]) -> Outcome:
    """Disconnect in the middle of a stream. Other requests are sent as usual."""
    if not body.get("stream"):
        return await _endpoint.ask(session, endpoint, body)
    async with session.post(f"{endpoint.url}/v1/chat/completions", json=body) as response:
        await response.content.readline()
    return Outcome("left", response.status)


def hostile() -> Iterator[str]:
    """Yield URLs of images that are too large, not images, or inside the network."""

    def data(content: bytes, kind: str = "image/png") -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    bomb = buffer.getvalue()
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    while True:
        yield data(bomb)
        yield data(b"\x89PNG\r\n\x1a\n" + os.urandom(21 * 2**20))
        yield data(small.getvalue()[:-40])
        yield data(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")
        yield "http://169.254.169.254/latest/meta-data/"
        yield "file:///etc/passwd"
        yield "data:image/png;base64,!!!!"


def attacking(images: Iterator[str]) -> Callable[..., Awaitable[Outcome]]:
    """Return a client whose every second request has such an image."""

    async def send(session: aiohttp.ClientSession, endpoint: Endpoint, body: dict[str, Any]) -> Outcome:
        if not body.get("stream"):
            return await _endpoint.ask(session, endpoint, body)
        image = {"type": "image_url", "image_url": {"url": next(images)}}
        content = [image, {"type": "text", "text": PROMPT}]
        return await _endpoint.ask(
            session, endpoint, {**body, "messages": [{"role": "user", "content": content}]}
        )

    return send


@contextmanager
def registry(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run an MLflow server with a registered adapter under an alias."""
    port = _endpoint.free_port()
    database = f"sqlite:///{folder / 'mlflow.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
    command += [
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves a dozen processes
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        _register(url, folder)
        yield url, server
    finally:
        _end(server)


def _register(url: str, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    import skipvision as sv
    from pipelines.tracking.client import TrackingError
    from pipelines.tracking.run import Tracker
    from skipvision.loading import load_model

    base = load_model(_endpoint.ROOT / "models" / MODEL, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=r".*language_model.*_proj"))
    sv.attach(model, sv.SkipConfig(**SKIP))
    sv.save_adapter(model, folder / "adapter")
    for _ in range(60):
        try:
            tracker = Tracker.start(url, experiment="faults", run_name="adapter", artifacts=folder)
            break
        except TrackingError:
            time.sleep(1)
    else:
        raise SystemExit(f"MLflow did not start: see {folder / 'server.log'}")
    tracker.register(folder / "adapter", ADAPTER, "champion")
    tracker.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """Kill the server's process group, which includes its workers."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# ------------------------------------------------------------------------------------------- the table


async def measured(options: argparse.Namespace, endpoint: Endpoint, server: subprocess.Popen[bytes]) -> str:
    """Run all cases in turn; returns the table."""
    sizes = count(12)

    async def redeployed() -> None:
        await asyncio.to_thread(endpoint.deploy, **options.settings, engine={"max_sequences": next(sizes)})

    async def registry_gone() -> None:
        _end(server)

    async with _endpoint.session() as session:
        load = Load(endpoint, session, options.proxy, options.rate, options.seconds, options.tokens)
        await load.during(None)  # warm up
        cases: dict[str, Callable[[], Awaitable[list[Outcome]]]] = {
            "nothing": lambda: load.during(None),
            "engine replica killed": lambda: load.during(killing(endpoint, f":engine-{MODEL}")),
            "ingress replica killed": lambda: load.during(killing(endpoint, ":ingress")),
            "HTTP proxy killed": lambda: load.during(killing(endpoint, LISTENS[options.proxy])),
            "Serve controller killed": lambda: load.during(killing(endpoint, "::ServeController")),
            "redeployed with other settings": lambda: load.during(redeployed),
            "half of the clients read slowly": lambda: load.during(None, slow),
            "half of the clients go away": lambda: load.during(None, leaving),
            "half of the images oversized or hostile": lambda: load.during(None, attacking(hostile())),
            "MLflow killed": lambda: load.during(registry_gone),
        }
        rows = []
        for name in options.cases or cases:
            moved = await _moved(endpoint, session)
            outcomes = await cases[name]()
            await load.settled()
            moved = await _moved(endpoint, session) - moved
            rows.append(_row(name, outcomes, moved))
            print(rows[-1], file=sys.stderr, flush=True)
        left = await asyncio.to_thread(endpoint.statistics)
    head = ["fault", "sent", "answered", "refused (4xx)", "failed or error event", "lost", "left"]
    head += ["given to another replica", "sent again by the client"]
    remaining = f"At the end {left.running} answers ran and {left.waiting} requests waited."
    return f"{_measure.table(head, rows)}\n\n{remaining}"


async def _moved(endpoint: Endpoint, session: aiohttp.ClientSession) -> float:
    """Count requests that an ingress moved to another engine, or the proxy to another ingress."""
    return sum([await endpoint.counted(session, name) for name in ("retries", "front_retries")])


def _row(name: str, outcomes: Sequence[Outcome], moved: float) -> list[str]:
    found = _endpoint.tally(outcomes)
    counts = [len(outcomes), *found.values(), int(moved), sum(outcome.again for outcome in outcomes)]
    return [name, *map(str, counts)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all faults and print the table; with --out, update the page."""
    options = _options().parse_args(arguments)
    load = os.getloadavg()[0]
    os.environ |= {"RAY_metrics_report_interval_ms": "500"}  # so that counters are current
    with tempfile.TemporaryDirectory() as folder, registry(Path(folder)) as (url, server):
        options.settings = {
            "ingresses": 2,
            "scaling": {"min_engines": 2, "max_engines": 2},
            "adapters": {ADAPTER: f"models:/{ADAPTER}@champion"},
            "tracking_uri": url,
            "adapter_poll_s": 1.0,
        }
        with _endpoint.local_endpoint(proxy=options.proxy, **options.settings) as endpoint:
            text = asyncio.run(measured(options, endpoint, server))
    command = Run("serve_faults", arguments).command
    what = (
        f"{options.rate:g} requests a second for {options.seconds:g} s a case, Poisson, half of them streamed"
    )
    text = f"`{command}`\n\n{_endpoint.machine(load)}; {what}.\n\n{text}"
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("serve_faults", __doc__)
    add = parser.add_argument
    add("--rate", type=float, default=5.0, help="requests per second (default: %(default)s)")
    add("--seconds", type=float, default=30.0, help="duration of each case (default: %(default)s)")
    add("--tokens", type=int, default=48, help="max tokens of each answer (default: %(default)s)")
    add("--proxy", choices=["ray", "haproxy"], default="ray", help="HTTP proxy (default: %(default)s)")
    add("--cases", nargs="+", help="run only these rows of the table")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="faults", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
