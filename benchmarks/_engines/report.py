"""Tables of the comparison of engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks._measure import FULL, Spread, table

Record = dict[str, Any]


def report(records: Sequence[Record]) -> str:
    """Format all records as Markdown."""
    engines, plugin = ([one for one in records if one["part"] == part] for part in ("engines", "plugin"))
    texts = [_heading(engines or plugin)]
    if engines:
        versions = {one["engine"]: one["versions"] for one in engines}
        texts += ["\n".join(f"- {name}: {text}" for name, text in versions.items()), engines_table(engines)]
        texts += [ratios_table(engines)]
    if plugin:
        texts += [f"### The plug-in's share of vLLM's prefill, {plugin[0]['setting']}", plugin_table(plugin)]
    return "\n\n".join(text for text in texts if text)


def _heading(records: Sequence[Record]) -> str:
    # Not in single backticks: docs/regenerate.sh would run them, by a Python without these engines.
    commands = "\n".join(["```text", *dict.fromkeys(one["command"] for one in records), "```"])
    first, loads = records[0], Spread.of([one["load"] for one in records])
    threads = f"{first['threads']} thread of each engine; " if first["threads"] else ""
    load = f"load average during the run {loads.text(digits=0)}"
    return f"{commands}\n\n{first['date']}; {first['machine']}; {threads}{load}."


def engines_table(records: Sequence[Record]) -> str:
    """Format throughput, latencies, CPU time and memory of each engine, setting and concurrency."""
    rows = []
    for engine, setting, concurrency in _cases(records):
        own = _of(records, engine, setting, concurrency)
        rows.append(
            [
                f"{engine}, {setting}",
                str(concurrency),
                Spread.of([one["requests"] / one["seconds"] for one in own]).text(digits=2),
                Spread.of([one["cpu_seconds"] / one["requests"] for one in own]).text(digits=2),
                Spread.of([one["first_token"] for one in own]).text(1000),
                Spread.of([one["per_token"] for one in own]).text(1000),
                f"{max(one['peak_bytes'] for one in own) / 2**30:.2f}",
            ]
        )
    head = ["engine", "at once", "requests/s", "CPU s a request", "TTFT ms", "TPOT ms", "peak GiB"]
    return table(head, rows)


def ratios_table(records: Sequence[Record]) -> str:
    """Format what pruning gains: full ÷ pruned in the same round."""
    rows = []
    for engine, setting, concurrency in _cases(records):
        if setting == FULL:
            continue
        row = [f"{engine}, {setting}", str(concurrency)]
        pruned, full = (_of(records, engine, one, concurrency) for one in (setting, FULL))
        for name in ("seconds", "cpu_seconds", "first_token", "per_token"):
            ratios = [before[name] / after[name] for before, after in zip(full, pruned, strict=True)]
            row.append(Spread.of(ratios).text(digits=2))
        rows.append(row)
    if not rows:
        return ""
    head = ["engine", "at once", "requests/s, pruned : full", "CPU time, full : pruned", "TTFT", "TPOT"]
    return "Ratios within a round, median (lowest – highest):\n\n" + table(head, rows)


def plugin_table(records: Sequence[Record]) -> str:
    """Format the plug-in's share of the prefill."""
    rows = []
    for record in records:
        prefill, own = record["prefill"], record["plugin"]
        shares = [part / whole for part, whole in zip(own, prefill, strict=True)]
        cpu = [part / whole for part, whole in zip(record["plugin_cpu"], record["prefill_cpu"], strict=True)]
        rows.append(
            [
                str(record["images"]),
                Spread.of(prefill).text(1000, 1),
                Spread.of(record["encoder"]).text(1000, 1),
                Spread.of(own).text(1000, 1),
                _percent(shares),
                _percent(cpu),
            ]
        )
    head = ["images", "prefill ms", "of it vision tower ms", "of it plug-in ms", "share", "share of CPU time"]
    return table(head, rows)


def _percent(shares: Sequence[float]) -> str:
    spread = Spread.of(shares)
    return f"{spread.median:.1%} ({spread.low:.1%} – {spread.high:.1%})"


def _cases(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """Return engines, settings and concurrencies: by engine, then by concurrency, full first."""
    found = {(one["engine"], one["concurrency"], one["setting"]) for one in records}
    engines = list(dict.fromkeys(one["engine"] for one in records))
    order = sorted(found, key=lambda case: (engines.index(case[0]), case[1], case[2] != FULL))
    return [(engine, setting, concurrency) for engine, concurrency, setting in order]


def _of(records: Sequence[Record], engine: str, setting: str, concurrency: int) -> list[Record]:
    """Return the records of one case in the order of their rounds."""
    case = (engine, setting, concurrency)
    own = [one for one in records if (one["engine"], one["setting"], one["concurrency"]) == case]
    return sorted(own, key=lambda one: one["turn"])
