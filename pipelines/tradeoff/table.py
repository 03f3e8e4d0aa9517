"""The points of a trade-off as Markdown: what each costs and scores, and what it loses by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.evaluation.items import OVERALL
from pipelines.evaluation.paired import FEW_CHANGES, Paired
from pipelines.evaluation.tables import markdown_table
from pipelines.tradeoff.points import FULL, GRID, Found


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
        "they say nothing about others, and of two or three they are still too narrow. Where fewer than "
        f"{FEW_CHANGES} images changed, all seeds of an image together, they are at least the exact binomial "
        "bounds.\n"
    )


def _points(own: Sequence[Found]) -> str:
    tasks = list(own[0].accuracy)
    columns = {
        "method": [one.point.method for one in own],
        "kept": ["all" if one.point.kept is None else "{} + {}".format(*one.point.kept) for one in own],
        "FLOPs": [_flops(one) for one in own],
        "with tower": [_percent(one.prefill_flops) for one in own],
        "KV": [_percent(one.kv_bytes) for one in own],
        "latency": [_latency(one) for one in own],
        **{task: [_percent(one.accuracy[task]) for one in own] for task in tasks},
        "− full": [_difference(one.gap[OVERALL]) for one in own],
        "by seed": [", ".join(map(_signed, one.by_seed)) if len(one.by_seed) > 1 else "" for one in own],
        "Skip-Vision − this": [_difference(one.behind) if one.behind else "" for one in own],
    }
    return _markdown({head: cells for head, cells in columns.items() if any(cells)})


def _by_task(own: Sequence[Found]) -> str:
    tasks = [task for task in own[0].gap if task != OVERALL]
    return _markdown(
        {
            "method": [one.point.method for one in own],
            "FLOPs": [_flops(one) for one in own],
            **{task: [_difference(one.gap[task]) for one in own] for task in tasks},
        }
    )


def _flops(one: Found) -> str:
    budget = one.point.budget
    return _percent(one.language_flops) + ("" if budget is None else f" of {100 * budget:g}")


def _latency(one: Found) -> str:
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
