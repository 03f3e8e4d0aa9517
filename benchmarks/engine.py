"""The gains of continuous batching over pruned caches: throughput, sequences in a budget, decode step.

    python -m benchmarks run engine --dtype bfloat16 --out docs/benchmarks/engine.md
    python -m benchmarks run engine --dtype bfloat16 --parts packing

Requests have one image, and answers of mixed lengths that are drawn once. All ways answer the same requests
with the same random weights, in turn, several times.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipvision as sv
from benchmarks import _measure
from benchmarks._measure import FULL, Geometry, Spread
from benchmarks._run import Run
from skipvision.engine import Engine, Request, Sampling

TEXT = 32
"""Number of words of every prompt."""

Way = Callable[[], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    run = Run("engine", arguments)
    model: Any = _measure.build(
        Geometry.scaled(options.hidden, options.layers, tower=256, tower_layers=4), device, dtype
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    parts = {
        "throughput": lambda: _throughput(model, options),
        "budget": lambda: _budget(model, options),
        "decode": lambda: _decode(model, options),
        "packing": lambda: _packing(model, options),
    }
    texts = [parts[name]() for name in options.parts]
    geometry = (
        f"hidden {options.hidden}, {options.layers} layers, {_visual(model)} visual tokens, {TEXT} words"
    )
    text = run.text(f"{options.dtype}, {geometry}", *texts)
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


# ------------------------------------------------------------------------------------ throughput


def _throughput(model: Any, options: argparse.Namespace) -> str:
    """Compare all ways to answer the same requests."""
    lengths = _measure.answer_lengths(options.requests, options.seed)
    requests = [
        Request(inputs=_inputs(model, number), sampling=Sampling(max_new_tokens=length))
        for number, length in enumerate(lengths)
    ]
    ways: dict[str, Way] = {}
    for setting in (FULL, options.setting):
        ways[f"`generate` one by one, {setting}"] = _static(model, requests, setting, 1)
        ways[f"`generate` in batches of {options.batch}, {setting}"] = _static(
            model, requests, setting, options.batch
        )
        ways[f"engine, {options.batch} sequences, {setting}"] = _engine(model, requests, setting, options)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            seconds[name].append(way())
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    static = f"`generate` in batches of {options.batch}, {FULL}"
    rows = []
    for name, values in seconds.items():
        ratios = [before / after for before, after in zip(seconds[static], values, strict=True)]
        rows.append(
            [
                name,
                Spread.of(values).text(digits=1),
                f"{len(requests) / Spread.of(values).median:.2f}",
                f"{sum(lengths) / Spread.of(values).median:.0f}",
                Spread.of(ratios).text(digits=2),
            ]
        )
    answers = f"answers of {min(lengths)} – {max(lengths)} tokens ({sum(lengths)} in all)"
    title = f"### {len(requests)} requests, {answers}"
    head = [
        "way",
        "seconds",
        "requests/s",
        "tokens/s",
        f"times as fast as batches of {options.batch}, {FULL}",
    ]
    return f"{title}\n\n{_measure.table(head, rows)}"


def _static(model: Any, requests: Sequence[Request], setting: str, batch: int) -> Way:
    """Run `generate` over batches of requests, in order. Each batch waits for its longest answer."""

    def run() -> float:
        begin = time.perf_counter()
        for at in range(0, len(requests), batch):
            group = requests[at : at + batch]
            inputs = {
                name: torch.cat([(request.inputs or {})[name] for request in group]).to(model.device)
                for name in group[0].inputs or {}
            }
            model.generate(
                **inputs,
                max_new_tokens=max(request.sampling.max_new_tokens for request in group),
                do_sample=False,
            )
        return time.perf_counter() - begin

    return _under(model, setting, run)


def _engine(model: Any, requests: Sequence[Request], setting: str, options: argparse.Namespace) -> Way:
    def run() -> float:
        config = _measure.setting(setting) or sv.SkipConfig.full()
        with Engine(model, None, config, max_sequences=options.batch, kv_budget_bytes=2**31) as engine:
            begin = time.perf_counter()
            failed = [completion.error for completion in engine.run(requests) if completion.error is not None]
            seconds = time.perf_counter() - begin
        if failed:
            raise failed[0]
        return seconds

    return run


def _under(model: nn.Module, setting: str, run: Way) -> Way:
    config = _measure.setting(setting)
    if config is None:
        return run

    def attached() -> float:
        with sv.attach(model, config):
            return run()

    return attached


# ---------------------------------------------------------------------------------------- budget


def _budget(model: Any, options: argparse.Namespace) -> str:
    """Find the max number of sequences that run at once in one KV budget."""
    new, budget = 32, options.budget_mib * 2**20
    running, rows = {}, []
    for setting in (FULL, options.setting):
        config = _measure.setting(setting) or sv.SkipConfig.full()
        with Engine(
            model, None, config, max_sequences=4096, kv_budget_bytes=budget, prefill_tokens=2**30
        ) as engine:
            request = Request(inputs=_inputs(model, 0), sampling=Sampling(max_new_tokens=new))
            cost = sv.predict_cost(model.config, config, text_tokens=TEXT, dtype=model.dtype)
            entry = cost.kv_bytes / _entries(model, config)
            fit = int(budget / (cost.kv_bytes + (new - 1) * entry))
            for _ in range(fit + 8):
                engine.submit(request)
            engine.step()
            now = engine.statistics()
            running[setting] = now.running
            rows.append(
                [
                    setting,
                    str(now.running),
                    str(fit),
                    f"{now.kv_bytes_reserved / 2**20:.1f}",
                    f"{now.kv_bytes_used / 2**20:.1f}",
                ]
            )
    ratio = running[options.setting] / running[FULL]
    title = f"### Sequences in {options.budget_mib} MiB of keys and values, {new} new tokens each"
    predicted = int(rows[1][2]) / int(rows[0][2])
    table = _measure.table(["setting", "running", "predicted", "reserved MiB", "used MiB"], rows)
    found = f"{ratio:.2f} times as many; predicted {predicted:.2f} ({ratio / predicted:.3f} of it)."
    return f"{title}\n\n{table}\n\n{found}"


def _entries(model: Any, config: sv.SkipConfig) -> int:
    return TEXT + config.cached(_visual(model))


# ---------------------------------------------------------------------------------------- decode


def _decode(model: Any, options: argparse.Namespace) -> str:
    """Compare the decode step with the time of reading weights and cache once."""
    weights = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if "vision_tower" not in name and "projector" not in name and "embed_tokens" not in name
    )
    rows = []
    for count in options.decode_rows:
        for setting in (FULL, options.setting):
            bandwidth = _bandwidth(weights, model.device)
            config = _measure.setting(setting) or sv.SkipConfig.full()
            with Engine(
                model, None, config, max_sequences=count, kv_budget_bytes=2**31, prefill_tokens=2**30
            ) as engine:
                request = Request(inputs=_inputs(model, 0), sampling=Sampling(max_new_tokens=200))
                for _ in range(count):
                    engine.submit(request)
                engine.step()
                steps = sorted(_steps(engine, model.device, options.steps))
                cache = engine.statistics().kv_bytes_used
            floor = (weights + cache) / bandwidth
            rows.append(
                [
                    setting,
                    str(count),
                    Spread.of(steps).text(1e3, 1),
                    f"{1e3 * floor:.1f}",
                    f"{Spread.of(steps).median / floor:.2f}",
                    f"{bandwidth / 1e9:.1f}",
                    f"{cache / 2**20:.0f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    head = ["setting", "rows", "step ms", "floor ms", "÷", "GB/s", "KV MiB"]
    profile = _profile(model, options)
    title = f"### Decode step; weights {weights / 2**20:.0f} MiB"
    return f"{title}\n\n{_measure.table(head, rows)}\n\n{profile}"


# --------------------------------------------------------------------------------------- packing


def _packing(model: Any, options: argparse.Namespace) -> str:
    """Compare prefill and decode steps with packed weights to those without, in turn."""
    if model.dtype != torch.bfloat16 or model.device.type != "cpu":
        raise SystemExit("--parts packing needs --dtype bfloat16 on the CPU: only these weights are packed")
    rows = []
    for setting in (FULL, options.setting):
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(1 + options.repeats):
            for packed in times:
                times[packed].append(_prefill_and_step(model, setting, packed, options))
        for number, part in enumerate((f"prefill of {options.batch} prompts", "decode step")):
            plain, packed = ([time[number] for time in times[way][1:]] for way in (False, True))
            ratios = [after / before for before, after in zip(plain, packed, strict=True)]
            times_of = [Spread.of(values).text(1e3, 1) for values in (plain, packed)]
            rows.append([setting, part, *times_of, Spread.of(ratios).text(digits=2)])
            print(rows[-1], file=sys.stderr, flush=True)
    head = ["setting", "part", "unpacked ms", "packed ms", "packed ÷ unpacked"]
    return f"### Packed weights, {options.batch} rows\n\n{_measure.table(head, rows)}"


def _prefill_and_step(
    model: Any, setting: str, packed: bool, options: argparse.Namespace
) -> tuple[float, float]:
    """Return the seconds of one prefill, and the median of those of a decode step."""
    config = _measure.setting(setting) or sv.SkipConfig.full()
    limits = {"max_sequences": options.batch, "kv_budget_bytes": 2**31, "prefill_tokens": 2**30}
    with Engine(model, None, config, **limits, pack_weights=packed) as engine:
        if packed and not engine.statistics().packed_bytes:
            raise SystemExit("this CPU does not multiply bfloat16, so no weights are packed")
        for _ in range(options.batch):
            engine.submit(Request(inputs=_inputs(model, 0), sampling=Sampling(max_new_tokens=200)))
        engine.step()
        steps = sorted(_steps(engine, model.device, options.steps))
        return engine.statistics().prefill_seconds, Spread.of(steps).median


def _steps(engine: Engine, device: torch.device, count: int) -> Iterator[float]:
    for _ in range(count):
        begin = time.perf_counter()
        engine.step()
        _wait(device)
        yield time.perf_counter() - begin


def _bandwidth(size: int, device: torch.device) -> float:
    """Measure the bandwidth of reading as many bytes as the weights have: the best of several runs."""
    values = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(7):
        _wait(device)
        begin = time.perf_counter()
        values.sum()
        _wait(device)
        best = max(best, values.nbytes / (time.perf_counter() - begin))
    return best


def _profile(model: Any, options: argparse.Namespace) -> str:
    """Profile a decode step by operator."""
    config = _measure.setting(options.setting) or sv.SkipConfig.full()
    with Engine(model, None, config, max_sequences=options.batch, kv_budget_bytes=2**31) as engine:
        for _ in range(options.batch):
            engine.submit(Request(inputs=_inputs(model, 0), sampling=Sampling(max_new_tokens=200)))
        while engine.statistics().waiting:
            engine.step()
        engine.step()
        with torch.profiler.profile() as profiler:
            begin = time.perf_counter()
            for _ in range(5):
                engine.step()
            _wait(model.device)
            total = time.perf_counter() - begin
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:8]
    rows = [
        [
            f"`{event.key}`",
            f"{event.self_cpu_time_total / 5e3:.2f}",
            f"{event.count / 5:.0f}",
            f"{event.self_cpu_time_total / 1e6 / total:.0%}",
        ]
        for event in events
    ]
    profiled = f"{options.setting}, {options.batch} rows, {1e3 * total / 5:.1f} ms under the profiler"
    return (
        f"Profile of a step, {profiled}:\n\n{_measure.table(['operator', 'self ms', 'calls', 'share'], rows)}"
    )


# ----------------------------------------------------------------------------------------- common


def _visual(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def _inputs(model: Any, seed: int) -> dict[str, torch.Tensor]:
    inputs = _measure.inputs_for(model, 1, TEXT)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(inputs["pixel_values"].shape, generator=generator)
    return {name: value.cpu() for name, value in {**inputs, "pixel_values": pixels.to(model.dtype)}.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("engine", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=["throughput", "budget", "decode"])
    add("--setting", default="100+156", help="RETAINED+SKIPPED (default: %(default)s)")
    add("--requests", type=int, default=24, help="requests of the throughput part (default: %(default)s)")
    add("--batch", type=int, default=8, help="sequences at once (default: %(default)s)")
    add("--repeats", type=int, default=3, help="runs of each way (default: %(default)s)")
    add("--budget-mib", type=int, default=64, help="KV budget of the budget part (default: %(default)s)")
    add("--decode-rows", type=int, nargs="+", default=[1, 8, 32])
    add("--steps", type=int, default=20, help="decode steps timed (default: %(default)s)")
    add("--hidden", type=int, default=1024, help="width of the decoder (default: %(default)s)")
    add("--layers", type=int, default=8, help="layers of the decoder (default: %(default)s)")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=0, help="torch threads; 0 = torch's choice")
    add("--seed", type=int, default=0, help="seed of the answers' lengths (default: %(default)s)")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="engine", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
