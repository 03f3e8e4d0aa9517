"""Formats the records of `benchmarks.gpu` as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks._engines.report import report as report_engines
from benchmarks._measure import FULL, Spread, table

Record = dict[str, Any]


def report(records: Sequence[Record]) -> str:
    """Format all runs as a part of a page."""
    engines = [record for record in records if "engine" in record]
    if engines:
        return report_engines(engines)
    first, loads = records[0], Spread.of([record["load"] for record in records])
    commands = "\n".join(["```text", *dict.fromkeys(record["command"] for record in records), "```"])
    shared = [first[name] for name in ("date", "device", "versions")]
    shared += [f"{first['text']} text tokens a row", f"load average {loads.text(digits=1)}"]
    return f"{commands}\n\n{'; '.join(shared)}.\n\n{tables(records)}"


def tables(records: Sequence[Record]) -> str:
    """Format one table for each run."""
    runs: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        runs[record["run"], record["batch"]].append(record)
    return "\n\n".join(_report_run(run) for run in runs.values())


def _report_run(records: Sequence[Record]) -> str:
    first = records[0]
    work = {"prefill": "Prefill", "train": "LoRA training step", "decode": "Decode step"}[first["piece"]]
    notes = [f"batch {first['batch']}", first["dtype"], "compiled layers" if first["compiled"] else "eager"]
    if first["checkpointing"]:
        notes.append("gradient checkpointing (FLOPs exclude the recomputation)")
    lines = [
        f"### {work}, {first['geometry']}, {', '.join(notes)}",
        _report_table(records),
    ]
    if first["compiled"]:
        lines.append(_report_compiling(records))
    return "\n\n".join(lines)


def _report_table(records: Sequence[Record]) -> str:
    full = next((r for r in records if r["setting"] == FULL and "seconds" in r), None)
    rows = []
    for record in records:
        row = [record["setting"], f"{record['flops'] / 1e12:,.3f}"]
        if "seconds" not in record:
            rows.append([*row, record["error"], *["–"] * 6])
            continue
        row.append(Spread.of(record["seconds"]).text(1000, 1))
        if full is None:
            row += ["–"] * 3
        else:
            flops = record["flops"] / full["flops"]
            pairs = zip(record["seconds"], full["seconds"], strict=True)
            ratio = Spread.of([some / whole for some, whole in pairs])
            row += [f"{flops:.3f}", ratio.text(digits=3), f"{ratio.median / flops:.2f}"]
        planning = Spread.of(
            [part / whole for part, whole in zip(record["planning"], record["seconds"], strict=True)]
        )
        row.append(f"{planning.median:.1%}")
        row.append(f"{record['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in record else "–")
        row.append(f"{record['kv_bytes'] / 2**20:,.1f}" if "kv_bytes" in record else "–")
        rows.append(row)
    head = [
        "retained+skipped",
        "TFLOPs predicted",
        "ms: median (min – max)",
        "FLOPs ratio",
        "time ratio",
        "time ÷ FLOPs",
        "planning",
        "peak GiB",
        "KV MiB",
    ]
    return table(head, rows)


def _report_compiling(records: Sequence[Record]) -> str:
    rows = [
        [
            record["setting"],
            f"{record['warm_up_seconds']:.0f}",
            str(record["graphs"]),
            str(sum(record["graph_breaks"].values())),
            f"{record['difference']:.1e}" if "difference" in record else "–",
        ]
        for record in records
        if "graphs" in record
    ]
    head = ["retained+skipped", "compiling s", "graphs", "graph breaks", "largest Δ logit ÷ σ"]
    reasons = {reason.splitlines()[0] for record in records for reason in record.get("graph_breaks", ())}
    return "\n".join(
        [table(head, rows), "", *(f"- graph break: {reason}" for reason in sorted(reasons))]
    ).strip()
