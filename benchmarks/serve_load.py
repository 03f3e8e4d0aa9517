"""The endpoint under load: rates and latencies, overhead of the framework, scaling, and a long run.

    python -m benchmarks run serve_load --parts load overhead scaling soak --out docs/benchmarks/serving.md

Requests arrive by a seeded Poisson process, without waiting for earlier answers. They caption 64 images in
turn, without the prefix cache. Clients, HTTP, ingress and engine share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import aiohttp
import torch

from benchmarks import _endpoint, _measure
from benchmarks._endpoint import FULL, MODEL, SKIP, Endpoint, Outcome
from benchmarks._run import Run
from serve.media.config import MediaConfig
from serve.media.fetch import MediaFetcher
from skipvision import Engine, Request, Sampling, SkipConfig
from skipvision.engine import prepare
from skipvision.loading import load_model, load_processor

SETTINGS = {"full": FULL, "64+64": SKIP}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
ROLES = {
    "engine": f":engine-{MODEL}",
    "ingress": ":ingress",
    "proxy": "ProxyActor",
    "controller": "Controller",
}
ENGINE_STAGES = ("queue", "prefill", "decode")


def tail(values: Sequence[float], scale: float = 1000.0, digits: int = 0) -> list[str]:
    """Format the median, 95 % and 99 % quantile, in milliseconds."""
    if len(values) < 2:
        return ["–"] * 3
    cuts = quantiles(values, n=100, method="inclusive")
    return [f"{scale * cuts[percent - 1]:,.{digits}f}" for percent in (50, 95, 99)]


# ------------------------------------------------------------------------------------------------ load


async def load(options: argparse.Namespace, endpoint: Endpoint, session: aiohttp.ClientSession) -> str:
    """Measure each offered rate and setting; returns a table and its figure."""
    rows, drawn = [], {}
    for name, skip in SETTINGS.items():
        for rate in options.rates:
            outcomes, seconds = await _offer(options, endpoint, session, rate, skip)
            done = [outcome for outcome in outcomes if outcome.kind == "answered"]
            first = [outcome.first for outcome in done if outcome.first is not None]
            between = [outcome.between for outcome in done if outcome.between is not None]
            found = _endpoint.tally(outcomes)
            served = len(done) / seconds
            counts = [found["answered"], found["refused"], found["failed"] + found["lost"]]
            sent = len(outcomes) / options.seconds
            cells = [name, f"{sent:.1f}", f"{served:.1f}", *map(str, counts)]
            rows.append([*cells, *tail(first)[:2], *tail(between, digits=1)[:2]])
            drawn.setdefault(name, []).append((sent, served, median(first or [float("nan")])))
            print(rows[-1], file=sys.stderr, flush=True)
    figure = _figure(options, "load", lambda axes: _draw_load(axes, drawn), 2)
    head = ["setting", "offered requests/s", "answered requests/s", "answered", "refused (429)", "failed"]
    head += [f"{what} {which}" for what in ("TTFT ms", "TPOT ms") for which in ("p50", "p95")]
    return f"{_measure.table(head, rows)}\n{figure}"


async def _offer(
    options: argparse.Namespace,
    endpoint: Endpoint,
    session: aiohttp.ClientSession,
    rate: float,
    skip: dict[str, Any],
) -> tuple[list[Outcome], float]:
    requests = _endpoint.bodies(1, max_tokens=options.tokens, skip=skip, **STREAMED)
    times = _endpoint.arrivals(rate, options.seconds, seed=1)
    begin = time.perf_counter()
    outcomes = await _endpoint.offered(times, lambda _: _endpoint.ask(session, endpoint, next(requests), 1))
    return outcomes, time.perf_counter() - begin


def _draw_load(axes: Any, drawn: dict[str, list[tuple[float, float, float]]]) -> None:
    for name, points in drawn.items():
        rates, served, first = zip(*points, strict=True)
        axes[0].plot(rates, served, marker="o", label=name)
        axes[1].plot(rates, [1000 * seconds for seconds in first], marker="o", label=name)
    axes[0].plot(rates, rates, color="grey", linewidth=0.7)
    axes[0].set(xlabel="offered requests/s", ylabel="answered requests/s")
    axes[1].set(xlabel="offered requests/s", ylabel="TTFT p50 (ms)", yscale="log")
    axes[0].legend()


# -------------------------------------------------------------------------------------------- overhead


async def overhead(options: argparse.Namespace, endpoint: Endpoint, session: aiohttp.ClientSession) -> str:
    """Send one request at a time, through the endpoint and through an engine in this process, in turn."""
    requests = _endpoint.bodies(2, max_tokens=options.tokens, skip=SKIP)
    through: list[Outcome] = []
    bare: list[float] = []
    ready: list[float] = []
    hops: dict[str, list[float]] = {"/v1/models": [], "/healthz": []}
    with _bare_engine() as alone:
        for number in range(options.requests + 5):
            body = next(requests)
            through.append(await _endpoint.ask(session, endpoint, body, 1))
            for into, seconds in zip((bare, ready), await alone(body), strict=True):
                into.append(1000 * seconds)
            for path, taken in hops.items():
                begin = time.perf_counter()
                async with session.get(endpoint.url + path) as response:
                    await response.read()
                taken.append(1000 * (time.perf_counter() - begin))
            if number == 4:  # end of the warm-up
                through, bare, ready, hops = [], [], [], {path: [] for path in hops}
    parts: dict[str, list[float]] = {"endpoint": [1000 * outcome.seconds for outcome in through]}
    parts["bare engine, from an image's file to the answer"] = bare
    parts["**overhead: endpoint − bare engine**"] = _differences(parts["endpoint"], bare)
    parts["bare engine, of a request that is prepared"] = ready
    parts["overhead over that"] = _differences(parts["endpoint"], ready)
    engine = [sum(outcome.stages.get(stage, 0.0) for stage in ENGINE_STAGES) for outcome in through]
    parts["the endpoint's engine"] = engine
    parts["overhead around it: endpoint − its own engine"] = _differences(parts["endpoint"], engine)
    for stage, meaning in (
        ("media", "base64 to an image's file"),
        ("prepare", "file to pixels, template, tokenizer, image processor"),
        ("rest", "ingress to engine and back"),
    ):
        parts[f"… {stage}: {meaning}"] = [outcome.stages[stage] for outcome in through]
    inside = [sum(outcome.stages.values()) for outcome in through]
    parts["… HTTP: client, proxy, ingress"] = _differences(parts["endpoint"], inside)
    parts["for comparison: `GET /v1/models`, answered by the ingress"] = hops["/v1/models"]
    parts["`GET /healthz`, which queries the engine a number"] = hops["/healthz"]
    rows = [[name, *tail(values, 1.0, 1)] for name, values in parts.items()]
    return _measure.table(["one request at a time", "p50 ms", "p95 ms", "p99 ms"], rows)


def _differences(whole: Sequence[float], part: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(whole, part, strict=True)]


@contextmanager
def _bare_engine() -> Iterator[Callable[[dict[str, Any]], Awaitable[tuple[float, float]]]]:
    """Run an engine in this process; yields a function that times a request, with and without preparation."""
    torch.set_num_threads(1)
    path = _endpoint.ROOT / "models" / MODEL
    processor: Any = load_processor(path)
    model = load_model(path, dtype=torch.float32)
    media = MediaFetcher(MediaConfig())

    async def seconds(body: dict[str, Any]) -> tuple[float, float]:
        file = await media.fetch(body["messages"][0]["content"][0]["image_url"]["url"])
        chat = [{"role": "user", "content": [{"type": "image"}, body["messages"][0]["content"][1]]}]
        sampling = Sampling(max_new_tokens=body["max_tokens"])
        begin = time.perf_counter()
        request = prepare(processor, Request(chat, [file.open()], sampling=sampling))
        ready = time.perf_counter()
        (completion,) = engine.run([request])
        if completion.error is not None:
            raise completion.error
        end = time.perf_counter()
        return end - begin, end - ready

    with Engine(model, processor, SkipConfig(**SKIP)) as engine:
        yield seconds


# --------------------------------------------------------------------------------------------- scaling


async def scaling(options: argparse.Namespace, endpoint: Endpoint, session: aiohttp.ClientSession) -> str:
    """Record a timeline: one engine, up to three under load, and one again."""
    low, high = options.timeline_rates
    third = options.timeline_seconds / 3
    times = [
        begin + moment
        for begin, rate in ((0.0, low), (third, high), (2 * third, low))
        for moment in _endpoint.arrivals(rate, third, seed=3)
    ]
    requests = _endpoint.bodies(3, max_tokens=options.tokens, skip=SKIP, **STREAMED)
    counts: list[tuple[float, int]] = []
    begin = time.perf_counter()
    sampler = asyncio.create_task(_sampled(counts, begin, endpoint.engines, 0.5))
    outcomes = await _endpoint.offered(times, lambda _: _endpoint.ask(session, endpoint, next(requests), 1))
    while counts[-1][1] > 1 and time.perf_counter() - begin < options.timeline_seconds + 60:
        await asyncio.sleep(0.5)
    sampler.cancel()
    figure = _figure(options, "scaling", lambda axes: _draw_scaling(axes, times, outcomes, counts, third), 3)
    changes = [
        counts[0],
        *(now for before, now in pairwise(counts) if before[1] != now[1]),
    ]
    engines = ", ".join(f"{number} from {moment:.0f} s on" for moment, number in changes)
    found = _endpoint.tally(outcomes)
    done = ", ".join(f"{count} {kind}" for kind, count in found.items())
    return f"Engines: {engines}. Of {len(outcomes)} requests: {done}.\n{figure}"


async def _sampled(
    into: list[tuple[float, Any]], begin: float, sample: Callable[[], Any], seconds: float
) -> None:
    while True:
        into.append((time.perf_counter() - begin, await asyncio.to_thread(sample)))
        await asyncio.sleep(seconds)


def _draw_scaling(
    axes: Any,
    times: Sequence[float],
    outcomes: Sequence[Outcome],
    counts: Sequence[tuple[float, int]],
    third: float,
) -> None:
    seconds = range(int(max(times)) + 1)
    axes[0].plot(seconds, [sum(second <= moment < second + 1 for moment in times) for second in seconds])
    axes[0].set(ylabel="requests/s")
    axes[1].step(*zip(*counts, strict=True), where="post")
    axes[1].set(ylabel="engines", ylim=(0, 3.5))
    firsts = [(outcome.at, outcome.first) for outcome in outcomes if outcome.first is not None]
    axes[2].plot([at for at, _ in firsts], [first for _, first in firsts], ".", markersize=3)
    axes[2].set(ylabel="TTFT (s)", xlabel="seconds")


# ------------------------------------------------------------------------------------------------ soak


async def soak(options: argparse.Namespace, endpoint: Endpoint, session: aiohttp.ClientSession) -> str:
    """Keep more clients busy than the engine has rows, for a long time; returns memory and leftovers."""
    requests = _endpoint.bodies(4, max_tokens=options.tokens)
    outcomes: list[Outcome] = []
    memory: list[tuple[float, dict[str, float]]] = []
    begin = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - begin < options.soak:
            body = {**next(requests), **(STREAMED if number % 2 else {})}
            outcomes.append(await _endpoint.ask(session, endpoint, body, 1))

    sampler = asyncio.create_task(_sampled(memory, begin, lambda: _resident(endpoint), options.soak / 60))
    await asyncio.gather(*(client(number) for number in range(options.clients)))
    seconds = time.perf_counter() - begin
    sampler.cancel()
    left = await asyncio.to_thread(endpoint.statistics)
    found = _endpoint.tally(outcomes)
    done = ", ".join(f"{count} {kind}" for kind, count in found.items())
    figure = _figure(options, "soak", lambda axes: _draw_soak(axes, memory), 1)
    rows = []
    for role in ROLES:
        values = [sizes[role] for _, sizes in memory]
        sixth = max(len(values) // 6, 1)
        cells = [median(values[sixth : 2 * sixth] or values), median(values[-sixth:]), max(values)]
        rows.append([role, *(f"{cell:,.0f}" for cell in cells)])
    head = ["resident memory", "MiB, second sixth (median)", "MiB, last sixth (median)", "MiB, most"]
    return (
        f"{options.clients} clients without a pause for {seconds:.0f} s, half of them streaming: {done}; "
        f"{len(outcomes) / seconds:.1f} requests/s. Afterwards {left.running} answers ran, {left.waiting} "
        f"requests waited, and {left.kv_bytes_reserved} bytes of the KV cache were reserved.\n\n"
        f"{_measure.table(head, rows)}\n{figure}"
    )


def _resident(endpoint: Endpoint) -> dict[str, float]:
    """Return the resident memory of each kind of process, in MiB."""
    sizes = {}
    for role, title in ROLES.items():
        sizes[role] = sum(process.memory_info().rss for process in endpoint.processes(title)) / 2**20
    return sizes


def _draw_soak(axes: Any, memory: Sequence[tuple[float, dict[str, float]]]) -> None:
    for role in ROLES:
        axes.plot([moment for moment, _ in memory], [sizes[role] for _, sizes in memory], label=role)
    axes.set(xlabel="seconds", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.legend()


# ----------------------------------------------------------------------------------------- the command


def _figure(options: argparse.Namespace, name: str, draw: Callable[[Any], None], panels: int) -> str:
    """Save a PNG next to the page; returns the Markdown that shows it, or nothing without a page."""
    if options.out is None:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure.subplots(1, 2) if name == "load" else figure.subplots(panels, 1, sharex=True))
    file = options.out.with_name(f"{options.out.stem}-{name}.png")
    figure.savefig(file, dpi=110)
    return f"\n![{name}]({file.name})\n"


PARTS = {
    "load": (load, {"engine": {"max_sequences": 16}}),
    "overhead": (overhead, {}),
    "scaling": (
        scaling,
        {
            "engine": {"max_sequences": 4},
            "scaling": {
                "min_engines": 1,
                "max_engines": 3,
                "target_load": 1.0,
                "upscale_delay_s": 2.0,
                "downscale_delay_s": 10.0,
                "interval_s": 0.5,
            },
        },
    ),
    "soak": (soak, {"engine": {"max_sequences": 16}}),
}


async def _run(options: argparse.Namespace, part: str, endpoint: Endpoint) -> str:
    async with _endpoint.session(keep=True) as session:
        warm = _endpoint.bodies(0, max_tokens=4)
        await asyncio.gather(*(_endpoint.ask(session, endpoint, next(warm)) for _ in range(4)))
        return await PARTS[part][0](options, endpoint, session)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update each part of the page."""
    options = _options().parse_args(arguments)
    command = Run("serve_load", arguments).command
    for part in options.parts:
        begin = os.getloadavg()[0]
        with _endpoint.local_endpoint(proxy=options.proxy, **PARTS[part][1]) as endpoint:
            found = asyncio.run(_run(options, part, endpoint))
        what = f"{part}: answers of {options.tokens} tokens at most"
        text = f"`{command}`\n\n{_endpoint.machine(begin)}; {what}.\n\n{found}"
        print(text, flush=True)
        if options.out:
            _measure.write_part(options.out, options.part or part, text)


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("serve_load", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=["load", "overhead", "scaling"])
    add("--tokens", type=int, default=32, help="max tokens of each answer (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[2, 4, 8, 12, 16, 24], help="load: offered requests/s")
    add("--seconds", type=float, default=15.0, help="load: seconds at each rate (default: %(default)s)")
    add("--requests", type=int, default=100, help="overhead: requests (default: %(default)s)")
    add("--timeline-rates", type=float, nargs=2, default=[1, 12], help="scaling: low and high requests/s")
    add(
        "--timeline-seconds",
        type=float,
        default=120.0,
        help="scaling: seconds of load (default: %(default)s)",
    )
    add("--soak", type=float, default=600.0, help="soak: seconds (default: %(default)s)")
    add("--clients", type=int, default=24, help="soak: clients at once (default: %(default)s)")
    add("--proxy", choices=["ray", "haproxy"], default="ray", help="HTTP proxy (default: %(default)s)")
    add("--out", type=Path, help="Markdown page to update; figures are saved next to it")
    add("--part", help="name of the page's part (default: the name of the measured part)")
    return parser


if __name__ == "__main__":
    main()
