"""The report of a scoring job: a Markdown table, a figure, and metrics for MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluation.figures import save, subplots
from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import FEW_CHANGES, Paired, paired, widened
from pipelines.evaluation.tables import markdown_table
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import describe_left_out
from pipelines.score.points import Scored, Systems, by_category, mean_score


@dataclass(frozen=True)
class Comparison:
    """A system compared with the reference on one dataset: on all its items, and on each slice."""

    overall: Paired
    slices: Mapping[str, Paired]


Comparisons = Mapping[str, Mapping[str, Comparison]]
"""The comparisons with the reference, by system and dataset."""


def compare(
    reference: Sequence[Item], other: Sequence[Item], *, resamples: int, confidence: float
) -> Comparison:
    """Compare two systems on the same items, overall and on each slice."""

    def compared(before: Sequence[Item], after: Sequence[Item]) -> Paired:
        return widened(paired(before, after, resamples=resamples, confidence=confidence), confidence)

    theirs, ours = by_category(reference), by_category(other)
    slices = {category: compared(theirs[category], ours[category]) for category in theirs}
    return Comparison(compared(reference, other), slices)


# --------------------------------------------------------------------------------------------- table


def markdown(
    config: ScoreConfig,
    scored: Systems,
    comparisons: Comparisons,
    left_out: Mapping[str, Mapping[str, int]],
) -> str:
    """Format the report: rows for each dataset, its slices and its totals; columns for each system.

    ``left_out`` holds the number of rows that were left out, by dataset and reason.
    """
    others = list(comparisons)
    interval = f"[{100 * config.confidence:g} % interval] p"
    head = [
        "mean score, %",
        "items",
        config.reference,
        *(title for label in others for title in (label, f"{label} − {config.reference} {interval}")),
    ]
    lines: list[list[str]] = []
    for dataset in (one.name for one in config.datasets):
        lines += _dataset_rows(dataset, config.reference, scored, comparisons)
    intervals = (
        f"Intervals: bootstrap over images; if fewer than {FEW_CHANGES} of them changed, at least the exact "
        "binomial bounds. p: exact McNemar test, for scores of 0 or 1."
    )
    notes = [
        intervals,
        *(f"{dataset}: {describe_left_out(counts)}." for dataset, counts in left_out.items() if counts),
        *_errors(scored),
    ]
    return "\n".join([markdown_table(head, lines), "", *notes, ""])


def _dataset_rows(
    dataset: str, reference: str, scored: Systems, comparisons: Comparisons
) -> Iterator[list[str]]:
    items = scored[reference][dataset].items
    found = [comparisons[label][dataset] for label in comparisons]
    yield _scores_row(f"**{dataset}**", items, [one.overall for one in found])
    for category, some in by_category(items).items():
        yield _scores_row(f"&emsp;{category}", some, [one.slices[category] for one in found])
    for total in scored[reference][dataset].totals:
        values = [scored[label][dataset].totals[total] for label in (reference, *comparisons)]
        first, *rest = (f"{value:.4g}" for value in values)
        yield [f"&emsp;*{total}*", "", first, *(cell for value in rest for cell in (value, ""))]


def _scores_row(title: str, items: Sequence[Item], compared: Sequence[Paired]) -> list[str]:
    cells = [title, str(len(items)), f"{100 * mean_score(items):.1f}"]
    for one in compared:
        p = "" if one.p_mcnemar is None else f" {one.p_mcnemar:.2g}"
        cells.append(f"{100 * one.other:.1f}")
        cells.append(f"{100 * one.difference:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]{p}")
    return cells


def _errors(scored: Systems) -> Iterator[str]:
    for label, datasets in scored.items():
        for dataset, one in datasets.items():
            failed = [item for item in one.items if item.error]
            if failed:
                yield f"{label} on {dataset}: {len(failed)} items have an error and count as wrong."


# -------------------------------------------------------------------------------------------- figure


def figure(config: ScoreConfig, scored: Systems, comparisons: Comparisons, path: Path) -> None:
    """Draw each system's mean scores as bars, with the interval of the difference to the reference."""
    names = [one.name for one in config.datasets]
    labels = [config.reference, *comparisons]
    width = 0.8 / len(labels)
    figure, axes = subplots(size=(max(5.0, 1.0 + 0.5 * len(names) * len(labels)), 4.0))
    for number, label in enumerate(labels):
        positions = [position + number * width for position in range(len(names))]
        heights = [100 * mean_score(scored[label][name].items) for name in names]
        bars = axes.bar(positions, heights, width, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, label_type="center")
        if label in comparisons:
            found = [comparisons[label][name].overall for name in names]
            below = [100 * (one.difference - one.low) for one in found]
            above = [100 * (one.high - one.difference) for one in found]
            axes.errorbar(positions, heights, yerr=[below, above], fmt="none", ecolor="black", capsize=3)
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(names))], names, rotation=20, ha="right")
    axes.set_ylabel("mean score, %")
    axes.set_title(f"{config.name}; black: interval of the difference to {config.reference}", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)


# -------------------------------------------------------------------------------------------- MLflow


def metrics(scored: Mapping[str, Scored], compared: Mapping[str, Comparison]) -> dict[str, float]:
    """Return a system's metrics by name. Scores and differences are fractions.

    ``accuracy/<dataset>`` and ``accuracy/<dataset>/<slice>`` are mean scores. ``difference/…``,
    ``difference_low/…``, ``difference_high/…`` and ``p_mcnemar/…`` compare with the reference.
    ``total/<dataset>/…`` are the benchmark's totals; ``items/<dataset>`` and ``errors/<dataset>`` are counts.
    """
    values: dict[str, float] = {}
    for dataset, one in scored.items():
        values[f"items/{dataset}"] = len(one.items)
        values[f"errors/{dataset}"] = sum(item.error is not None for item in one.items)
        values[f"accuracy/{dataset}"] = mean_score(one.items)
        for category, items in by_category(one.items).items():
            values[f"accuracy/{dataset}/{category}"] = mean_score(items)
        for total, value in one.totals.items():
            values[f"total/{dataset}/{total}"] = value
    for dataset, comparison in compared.items():
        for category, pair in {"": comparison.overall, **comparison.slices}.items():
            name = f"{dataset}/{category}".rstrip("/")
            values[f"difference/{name}"] = pair.difference
            values[f"difference_low/{name}"] = pair.low
            values[f"difference_high/{name}"] = pair.high
            if pair.p_mcnemar is not None:
                values[f"p_mcnemar/{name}"] = pair.p_mcnemar
    return values
