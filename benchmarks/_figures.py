"""The pages' numbers side by side: tables for docs/benchmarks/README.md, and figures.

They are read from the JSON next to each page, so `update` needs no measurement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._record import Record, table, tables_of, write_part, write_records
from benchmarks._registry import BENCHMARKS

SETTING = "100+156"
"""The setting of the tables: 100 tokens of 576 retained, 156 skipped."""
ENGINES = {"native": "this project", "vllm": "vLLM", "openvino": "OpenVINO GenAI"}
CLIENTS = [1, 4, 16, 64]

Row = dict[str, Any]


def update(folder: Path) -> Iterator[Path]:
    """Write the JSON of each page, the README's tables and the figures; yields the files."""
    for page in sorted(folder.glob("*.md")):
        file = write_records(page) if page.name != "README.md" else None
        if file is not None:
            yield file
    for part, text in tables(folder).items():
        write_part(folder / "README.md", part, text)
    yield folder / "README.md"
    yield from _draw(folder)


def tables(folder: Path) -> dict[str, str]:
    """Return the generated parts of the README by their names."""
    return {"time": _time_table(folder), "engines": _engines_tables(folder), "list": _list_table()}


def _read(folder: Path, page: str) -> dict[str, Record]:
    return json.loads((folder / f"{page}.json").read_text())


def _middle(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


# -------------------------------------------------------------------------------- time against FLOPs


def _time_rows(folder: Path) -> Iterator[tuple[str, str, Row, Record]]:
    """Yield geometry, work, the row of `SETTING` and its record."""
    for record in _read(folder, "time_follows_flops").values():
        shape = re.search(r"(\d+) layers, hidden (\d+).* batch (\d+)", " ".join(record["notes"]))
        if shape is None:
            raise SystemExit(f"{record['command']}: its part of the page names no geometry")
        geometry = f"hidden {shape[2]} × {shape[1]} layers, batch {shape[3]}"
        for found in record["tables"]:
            for row in found["rows"]:
                if row["retained+skipped"] == SETTING:
                    yield geometry, found["title"], row, record


def _time_table(folder: Path) -> str:
    kept = _kept(folder)
    rows = []
    for geometry, work, row, record in _time_rows(folder):
        ratio = row["time ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f} – {ratio['high']:.2f})"
        quotient = f"{row['time ÷ FLOPs']:.2f}"
        rows.append(
            [geometry, work, f"{row['FLOPs ratio']:.2f}", spread, quotient, f"{kept:.2f}", record["date"]]
        )
    rows.append(_demo_row(folder))
    head = ["model", "work", "FLOPs ratio", "time ratio", "time ÷ FLOPs", "KV cache ratio", "measured"]
    return table(head, rows)


def _kept(folder: Path) -> float:
    """Return the KV bytes of a sequence, pruned ÷ full, where as many as possible run in one budget."""
    record = _read(folder, "engine")["engine-bfloat16"]
    (found,) = (one for one in record["tables"] if one["title"].startswith("Sequences"))
    size = {row["setting"]: row["used MiB"] / row["running"] for row in found["rows"]}
    return size[SETTING] / size["full"]


def _demo_row(folder: Path) -> list[str]:
    """Return the row of the demo, from its page."""
    page = (folder.parent / "demo.md").read_text()
    (costs,) = (found["rows"] for found in tables_of(page) if "cost" in found["rows"][0])
    ratio = {row["cost"]: row["skip ÷ full"] for row in costs}
    values = [
        ratio["training FLOPs per row, measured"],
        ratio["training step (median)"],
        ratio["step time ratio ÷ training FLOPs ratio"],
        ratio["KV cache per image"],
    ]
    cells = [f"{value:.2f}" for value in values]
    return [
        "[the demo](../demo.md): hidden 192 × 6 layers, 64+64 of 256 tokens",
        "LoRA training step",
        *cells,
        "–",
    ]


# ------------------------------------------------------------------------------------------ engines


def _engine_rows(folder: Path) -> dict[tuple[str, str], dict[int, Row]]:
    """Return the rows of the engines' table by engine and setting, and by number of clients."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in _read(folder, "engines")["engines"]["tables"][0]["rows"]:
        engine, setting = row["engine"].split(", ")
        found.setdefault((engine, setting), {})[int(row["at once"])] = row
    order = list(ENGINES)
    return dict(sorted(found.items(), key=lambda item: (item[0][1] != "full", order.index(item[0][0]))))


def _engines_tables(folder: Path) -> str:
    date = _read(folder, "engines")["engines"]["date"]
    texts = []
    for name, title, digits in (
        ("CPU s a request", "CPU seconds of a request", 2),
        ("requests/s", "Requests a second", 2),
        ("TTFT ms", "Milliseconds to the first token", 0),
        ("peak GiB", "Peak memory, GiB", 1),
    ):
        rows = []
        for (engine, setting), by_clients in _engine_rows(folder).items():
            cells = [f"{_middle(by_clients[clients][name]):,.{digits}f}" for clients in CLIENTS]
            rows.append([f"{ENGINES[engine]}, {setting}", *cells])
        head = [f"{title} ({date})", *(f"{clients} at once" for clients in CLIENTS)]
        texts.append(table(head, rows))
    return "\n\n".join(texts)


def _list_table() -> str:
    rows = [
        [
            f"`{one.name}`",
            one.question,
            one.duration,
            one.needs,
            f"[{one.page}]({one.page})",
        ]
        for one in BENCHMARKS
    ]
    return table(["benchmark", "question", "duration", "needs", "results"], rows)


# ------------------------------------------------------------------------------------------ figures


def _draw(folder: Path) -> Iterator[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    _draw_time(figure.subplots(), list(_time_rows(folder)))
    yield _save(figure, folder / "time-and-flops.png")
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    _draw_engines(figure.subplots(1, 2), _engine_rows(folder))
    yield _save(figure, folder / "engines.png")


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=110)
    return file


def _draw_time(axes: Any, rows: Sequence[tuple[str, str, Row, Record]]) -> None:
    names = [f"{geometry}\n{work}" for geometry, work, _, _ in rows]
    at = range(len(rows))
    flops = [row["FLOPs ratio"] for _, _, row, _ in rows]
    time = [_middle(row["time ratio"]) for _, _, row, _ in rows]
    low = [middle - row["time ratio"]["low"] for middle, (_, _, row, _) in zip(time, rows, strict=True)]
    high = [row["time ratio"]["high"] - middle for middle, (_, _, row, _) in zip(time, rows, strict=True)]
    axes.barh([number - 0.2 for number in at], flops, 0.38, label="FLOPs")
    axes.barh([number + 0.2 for number in at], time, 0.38, xerr=[low, high], label="time", ecolor="grey")
    axes.set_yticks(list(at), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=f"{SETTING} of 576 tokens ÷ full tokens", xlim=(0, 0.6))
    axes.legend()


def _draw_engines(axes: Any, rows: dict[tuple[str, str], dict[int, Row]]) -> None:
    colours = dict(zip(ENGINES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for (engine, setting), by_clients in rows.items():
        style = {"color": colours[engine], "linestyle": "--" if setting == "full" else "-", "marker": "o"}
        for panel, name in zip(axes, ("CPU s a request", "requests/s"), strict=True):
            values = [_middle(by_clients[clients][name]) for clients in CLIENTS]
            panel.plot(CLIENTS, values, label=f"{ENGINES[engine]}, {setting}", **style)
    for panel, label in zip(axes, ("CPU seconds of a request", "requests/s"), strict=True):
        panel.set(xlabel="requests at once", ylabel=label, ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
    axes[0].legend(fontsize=7)
