"""The report of a comparison: Markdown tables and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.evaluation.figures import FULL_COLOUR, SKIP_COLOUR, hide_box, save, subplots
from pipelines.evaluation.items import OVERALL
from pipelines.evaluation.paired import FEW_CHANGES
from pipelines.evaluation.tables import markdown_table
from skipvision.errors import ConfigError

_COLUMNS = {
    "full untuned": "full, untuned",
    "skip untuned": "skip, untuned",
    "full": "full, tuned",
    "skip": "skip, tuned",
}
_BEGIN, _END = "<!-- demo table -->", "<!-- /demo table -->"
_COSTS = {
    "seconds_per_step": ("training step (median)", "{:.3f} s", 1.0),
    "training_seconds": ("training, all steps", "{:.0f} s", 1.0),
    "train_flops": ("training FLOPs per row, measured", "{:.2f} G", 1e-9),
    "train_flops_predicted": ("training FLOPs per row, predicted", "{:.2f} G", 1e-9),
    "prefill_flops": ("prefill FLOPs per row, measured", "{:.2f} G", 1e-9),
    "prefill_flops_predicted": ("prefill FLOPs per row, predicted", "{:.2f} G", 1e-9),
    "kv_bytes_per_image": ("KV cache per image", "{:.1f} KiB", 1 / 1024),
}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the accuracy table and the cost table."""
    return f"{_accuracy_table(result)}\n{_cost_table(result)}"


def _accuracy_table(result: Mapping[str, Any]) -> str:
    shares = result["exact_match"]
    columns = [name for name in _COLUMNS if name in shares]
    header = ["exact match, %", *(_COLUMNS[name] for name in columns), "skip − full, tuned [95 % interval]"]
    lines = []
    for task, gap in result["difference"].items():
        points = [100 * gap[key] for key in ("difference", "low", "high")]
        cells = [f"{100 * shares[name][task]:.1f}" for name in columns]
        lines.append([task, *cells, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(p + 0.0 for p in points))])
    return (
        f"{markdown_table(header, lines)}\n\n"
        f"{result['rows']} questions about {result['images']} test images; "
        f"intervals by bootstrap over images; where fewer than {FEW_CHANGES} images changed, they are at "
        "least the exact binomial bounds.\n"
    )


def _cost_table(result: Mapping[str, Any]) -> str:
    full, skip = result["costs"]["full"], result["costs"]["skip"]
    lines = []
    for key, (label, form, scale) in _COSTS.items():
        amounts = [form.format(side[key] * scale) for side in (full, skip)]
        lines.append([label, *amounts, f"{result['ratios'][key]:.3f}"])
    ratios = result["ratios"]
    followed = ratios["seconds_per_step"] / ratios["train_flops"]
    lines.append(["step time ratio ÷ training FLOPs ratio", "", "", f"{followed:.2f}"])
    chosen = result["skip_config"]
    table = markdown_table(["cost", "full", "skip", "skip ÷ full"], lines)
    return (
        f"{table}\n\nSkip-Vision: retained {chosen['retained']}, skipped {chosen['skipped']}, "
        f"select {chosen['select']}, merge {chosen['merge']}, summary tokens {chosen['summary_tokens']}.\n"
    )


def check_marked(file: Path) -> None:
    """Raise `ConfigError` unless the file has the two marks that enclose the demo's table."""
    _outside_marks(file)


def renew_marked(file: Path, table: str) -> None:
    """Replace the text between the marks by the table."""
    before, after = _outside_marks(file)
    file.write_text(f"{before}{_BEGIN}\n{table}{_END}{after}")


def _outside_marks(file: Path) -> tuple[str, str]:
    """Return the text before and after the marks."""
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"readme = {file}: {error.strerror}") from None
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ConfigError(f"readme = {file}: it needs a line {_BEGIN} and a line {_END} after it")
    return before, after


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw exact match per task and the cost ratios as two bar charts, and save them as a PNG."""
    shares = result["exact_match"]
    columns = [name for name in _COLUMNS if name in shares]
    tasks = [*(task for task in result["difference"] if task != OVERALL), OVERALL]
    colours = {"full untuned": "#c9d1db", "skip untuned": "#f3c9a5", "full": FULL_COLOUR, "skip": SKIP_COLOUR}
    figure, (left, right) = subplots(1, 2, size=(11, 4), width_ratios=[3, 1.3])
    width = 0.8 / len(columns)
    for number, name in enumerate(columns):
        at = [i + (number - (len(columns) - 1) / 2) * width for i in range(len(tasks))]
        left.bar(
            at, [100 * shares[name][task] for task in tasks], width, label=_COLUMNS[name], color=colours[name]
        )
    left.set_xticks(range(len(tasks)), tasks)
    left.set_ylabel("exact match, %")
    left.set_ylim(0, 100)
    left.legend(ncols=len(columns), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    labels = {
        "train_flops": "training FLOPs",
        "seconds_per_step": "step time",
        "prefill_flops": "prefill FLOPs",
        "kv_bytes_per_image": "KV bytes per image",
    }
    values = [100 * result["ratios"][key] for key in labels]
    bars = right.barh(list(labels.values()), values, color=colours["skip"])
    right.bar_label(bars, fmt="%.0f %%", padding=3)
    right.axvline(100, color=colours["full"])
    right.set_xlim(0, 115)
    right.invert_yaxis()
    right.set_title("Skip-Vision, % of full tokens", fontsize=10)
    for axis in (left, right):
        hide_box(axis)
    save(figure, path)
