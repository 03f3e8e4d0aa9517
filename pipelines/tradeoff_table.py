"""The points of a trade-off as Markdown: what each costs and scores, and what it loses by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.evaluate import OVERALL
from pipelines.statistics import Paired
from pipelines.tradeoff_points import FULL, GRID

if TYPE_CHECKING:
    from pipelines.tradeoff import Found


def table(found: Sequence[Found], *, rows: int, text_tokens: int) -> str:
    """Of each adapter all points, and the intervals by task of those that are not of the grid."""
    blocks = []
    for label in dict.fromkeys(one.point.adapter for one in found):
        own = [one for one in found if one.point.adapter == label]
        seeds = len(own[0].by_seed)
        blocks.append(f"**{label}**" + (f", {seeds} seeds" if seeds > 1 else ""))
        blocks.append(_points(own))
        if compared := [one for one in own if one.point.method not in (FULL, GRID)]:
            blocks += [f"**{label}**: − full, by task", _by_task(compared)]
    return "\n\n".join(blocks) + (
        f"\n\n{rows} questions, {text_tokens} tokens of text on average; exact match in %. Kept: retained + "
        "skipped visual tokens. Costs in % of full tokens: prefill FLOPs behind the vision tower (of those "
        "that may be spent, if there is such a limit), with the tower, "
        "KV bytes (these three predicted), and time to the first token (measured: median [quartiles] of the "
        "ratio to full tokens in the same round). − full: what is gained against full tokens, those of the "
        "adapter that this one is compared with. Skip-Vision − this: what Skip-Vision gains against the row, "
        "under the same adapter, where both may spend the same. In brackets intervals of 95 %, each for "
        "itself, by bootstrap over images and, where there are several, seeds of the fine-tune; of one seed "
        "they say nothing about others, and of two or three they are still too narrow.\n"
    )


def _points(own: Sequence[Found]) -> str:
    tasks = list(own[0].accuracy)
    head = ["method", "kept", "FLOPs", "with tower", "KV", "latency", *tasks, "− full"]
    several = len(own[0].by_seed) > 1
    head += ["by seed"] if several else []
    rivals = any(one.behind for one in own)
    head += ["Skip-Vision − this"] if rivals else []
    lines = []
    for one in own:
        cells = [one.point.method, *_costs(one), *(f"{100 * one.accuracy[task]:.1f}" for task in tasks)]
        cells.append(_difference(one.gap[OVERALL]))
        if several:
            seeds = one.by_seed if len(one.by_seed) > 1 else []
            cells.append(", ".join(_signed(value) for value in seeds))
        if rivals:
            cells.append(_difference(one.behind) if one.behind else "")
        lines.append(cells)
    return _markdown(head, lines)


def _by_task(own: Sequence[Found]) -> str:
    tasks = [task for task in own[0].gap if task != OVERALL]
    lines = [[one.point.method, _flops(one), *(_difference(one.gap[task]) for task in tasks)] for one in own]
    return _markdown(["method", "FLOPs", *tasks], lines)


def _costs(one: Found) -> list[str]:
    latency = ""
    if one.latency is not None and one.latency_quartiles is not None:
        low, high = one.latency_quartiles
        latency = f"{100 * one.latency:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
    kept = "all" if one.point.kept is None else "{} + {}".format(*one.point.kept)
    return [
        kept,
        _flops(one),
        *(f"{100 * share:.1f}" for share in (one.prefill_flops, one.kv_bytes)),
        latency,
    ]


def _flops(one: Found) -> str:
    budget = one.point.budget
    return f"{100 * one.language_flops:.1f}" + ("" if budget is None else f" of {100 * budget:g}")


def _difference(gap: Paired) -> str:
    return f"{_signed(gap.difference)} [{_signed(gap.low)}, {_signed(gap.high)}]"


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # no -0.0


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
