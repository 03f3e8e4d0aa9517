"""The results of a trade-off as Markdown tables: costs and accuracy of each point, and losses by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.evaluation.calibration import BINS
from pipelines.evaluation.items import OVERALL
from pipelines.evaluation.paired import FEW_CHANGES, Paired
from pipelines.evaluation.tables import markdown_table
from pipelines.tradeoff.config import FULL, GRID
from pipelines.tradeoff.evidence import columns_of
from pipelines.tradeoff.pixels import PIXELS_WITH_TOWER
from pipelines.tradeoff.results import Cell, PointResult
from pipelines.tradeoff.timing import DECODED

PARTS = ("tower", "selection", "prefill", "decode")
"""The columns of the times in `PointResult.parts`, in their order."""

_NOTES = (
    "{rows} questions, with {text_tokens} text tokens on average. Exact match in %. Kept: retained + "
    "skipped visual tokens. Costs in % of full tokens: prefill FLOPs after the vision tower (and the "
    "budget, if any), prefill FLOPs with the tower, and KV bytes are predicted; time to the first token"
    " is measured (median [quartiles] of the ratio to full tokens in the same round). Tower, selection and "
    "prefill are its parts, in % of the whole time to the first token of full tokens; decode is the time per "
    "further token, over {decoded} tokens, in % of theirs. − full: "
    "difference to full tokens under the reference adapter. Skip-Vision − this: difference between "
    "Skip-Vision and the row, under the same adapter and budget. Brackets hold 95 % intervals, each on "
    "its own, by bootstrap over images and, where there are several, over seeds of the fine-tune. With "
    "one seed they say nothing about other seeds; with two or three they are still too narrow. Where "
    "fewer than {few} images changed, counting all seeds of an image once, they are at least the exact "
    "binomial bounds. ECE: distance between the mean probability of answers and their mean score, averaged "
    "over {bins} bins of equal width; mean over seeds. Smaller images at equal seconds: the largest measured "
    "size whose median time to the first token is no longer than that of the row. Answers that differ: the "
    "number of answers, over all seeds, that Skip-Vision alone : this row alone has right. Detectable: the "
    "smallest true difference whose interval would exclude 0 in 80 % of such comparisons; for the measured "
    "difference that would take about as many questions as the last column has.\n"
)


def table(results: Sequence[PointResult], *, rows: int, text_tokens: int) -> str:
    """List all points of each adapter, then the intervals by task of those that are not in the grid."""
    blocks = []
    for label in dict.fromkeys(one.point.adapter for one in results):
        own = [one for one in results if one.point.adapter == label]
        seeds = len(own[0].by_seed)
        blocks.append(f"**{label}**" + (f", {seeds} seeds" if seeds > 1 else ""))
        blocks.append(_points(own))
        if compared := [one for one in own if one.point.method not in (FULL, GRID)]:
            blocks += [f"**{label}**: − full, by task", _by_task(compared)]
        for title in dict.fromkeys(title for one in own for title in one.evidence):
            blocks += [f"**{label}**: {title}", _further(title, own)]
    notes = _NOTES.format(rows=rows, text_tokens=text_tokens, few=FEW_CHANGES, decoded=DECODED, bins=BINS)
    blocks.append(notes)
    return "\n\n".join(blocks)


def _points(own: Sequence[PointResult]) -> str:
    tasks = list(own[0].accuracy)
    columns = {
        "method": [one.point.method for one in own],
        "kept": ["all" if one.point.kept is None else "{} + {}".format(*one.point.kept) for one in own],
        "FLOPs": [_flops(one) for one in own],
        "with tower": [_percent(one.prefill_flops) for one in own],
        "KV": [_percent(one.kv_bytes) for one in own],
        "latency": [_latency(one) for one in own],
        **{
            title: ["" if one.parts is None else f"{100 * one.parts[at]:.0f}" for one in own]
            for at, title in enumerate(PARTS)
        },
        **{task: [_percent(one.accuracy[task]) for one in own] for task in tasks},
        "− full": [_difference(one.gap[OVERALL]) for one in own],
        "by seed": [", ".join(map(_signed, one.by_seed)) if len(one.by_seed) > 1 else "" for one in own],
        "Skip-Vision − this": [_difference(one.behind) if one.behind else "" for one in own],
    }
    return _markdown({head: cells for head, cells in columns.items() if any(cells)})


def _by_task(own: Sequence[PointResult]) -> str:
    tasks = [task for task in own[0].gap if task != OVERALL]
    return _markdown(
        {
            "method": [one.point.method for one in own],
            "FLOPs": [_flops(one) for one in own],
            **{task: [_difference(one.gap[task]) for one in own] for task in tasks},
        }
    )


def _further(title: str, own: Sequence[PointResult]) -> str:
    some = [one for one in own if title in one.evidence]
    columns = columns_of([one.evidence[title] for one in some])
    rows = [
        (one.point.method, _flops(one), *(_cell(one.evidence[title].get(column)) for column in columns))
        for one in some
    ]
    # A difference follows the number that it is about.
    return markdown_table(["method", "FLOPs", *(column.rpartition(": ")[2] for column in columns)], rows)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.difference is not None:
        found = cell.difference
        numbers = (found.difference, found.low, found.high)
        change, low, high = (_signed(n) if cell.percent else f"{n:+.3f}" for n in numbers)
        return f"{change} [{low}, {high}]"
    if cell.value is None:
        return cell.text
    return _percent(cell.value) if cell.percent else f"{cell.value:.3f}"


def _flops(one: PointResult) -> str:
    budget = one.point.budget
    text = _percent(one.language_flops)
    if budget is None:
        return text
    return f"{text} of {100 * budget:g}" + (" and tower" if one.point.method == PIXELS_WITH_TOWER else "")


def _latency(one: PointResult) -> str:
    if one.latency is None or one.latency_quartiles is None:
        return ""
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * share for share in (one.latency, *one.latency_quartiles)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _difference(gap: Paired) -> str:
    return f"{_signed(gap.difference)} [{_signed(gap.low)}, {_signed(gap.high)}]"


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # no -0.0


def _markdown(columns: Mapping[str, Sequence[str]]) -> str:
    return markdown_table(list(columns), zip(*columns.values(), strict=True))
