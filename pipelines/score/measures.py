"""Measures of answers besides their scores: calibration, objects in captions, and places.

All of it is computed from the scored items, so no question is answered for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.evaluation.calibration import BINS, calibration, compare_calibration
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.measures import compare_measure, mean_of
from pipelines.evaluation.objects import ObjectWords
from pipelines.evaluation.paired import Difference
from pipelines.evaluation.tables import markdown_table
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import Dataset
from pipelines.score.points import Systems, by_category

ECE, BRIER = "ece", "brier"


@dataclass(frozen=True)
class Measured:
    """One measure on one slice of a dataset.

    Attributes:
        dataset: its name.
        part: the slice, or `OVERALL`.
        name: the measure's name in results.
        title: its name in tables.
        values: its value for each system; a system whose answers do not have it is missing.
        differences: the difference of each other system to the reference.
        percent: whether tables show it in percent.
    """

    dataset: str
    part: str
    name: str
    title: str
    values: Mapping[str, float]
    differences: Mapping[str, Difference] = field(default_factory=dict)
    percent: bool = False


def measure(config: ScoreConfig, datasets: Sequence[Dataset], scored: Systems) -> list[Measured]:
    """Compute all measures of all systems: calibration overall and by slice, then those of the benchmark."""
    return [
        one
        for dataset in datasets
        for one in (*_calibration(config, dataset, scored), *_others(config, dataset, scored))
    ]


def _calibration(config: ScoreConfig, dataset: Dataset, scored: Systems) -> Iterator[Measured]:
    slices = {label: _slices(datasets[dataset.name].items) for label, datasets in scored.items()}
    for part, reference in slices[config.reference].items():
        found = {label: one for label in scored if (one := calibration(slices[label][part]))}
        compared = {
            label: pair
            for label in found
            if label != config.reference
            and (pair := compare_calibration([(reference, slices[label][part])], **_statistics(config)))
        }
        if found:
            yield Measured(
                *(dataset.name, part, ECE, "calibration error (ECE)"),
                {label: one.ece for label, one in found.items()},
                {label: ece for label, (ece, _) in compared.items()},
            )
            yield Measured(
                *(dataset.name, part, BRIER, "Brier score"),
                {label: one.brier for label, one in found.items()},
                {label: brier for label, (_, brier) in compared.items()},
            )


def _others(config: ScoreConfig, dataset: Dataset, scored: Systems) -> Iterator[Measured]:
    """Yield the measures of the benchmark, and the objects in captions if the settings name objects."""
    gold = {(dataset.name, question.item): question.row.get("answer", "") for question in dataset.questions}
    makers = [*dataset.benchmark.measures]
    if dataset.name in config.objects:
        makers.append(ObjectWords(config.objects[dataset.name]).measures)
    items = {label: datasets[dataset.name].items for label, datasets in scored.items()}
    for one in (each for make in makers for each in make(gold)):
        values = {label: value for label in items if (value := mean_of(one, items[label])) is not None}
        sides = {label: [(items[config.reference], other)] for label, other in items.items()}
        compared = {
            label: pair
            for label in values
            if label != config.reference
            and (pair := compare_measure(one, sides[label], **_statistics(config)))
        }
        if values:
            yield Measured(dataset.name, one.part, one.name, one.title, values, compared, one.percent)


def _slices(items: Sequence[Item]) -> dict[str, list[Item]]:
    return {OVERALL: list(items), **by_category(items)}


def _statistics(config: ScoreConfig) -> dict[str, Any]:
    return {"resamples": config.resamples, "confidence": config.confidence}


# --------------------------------------------------------------------------------------- the outputs


def measures_table(config: ScoreConfig, measured: Sequence[Measured]) -> str:
    """Format the measures: one row for each, with a column for each system."""
    if not measured:
        return "Calibration: not measured. The answers are of an earlier version, without probabilities.\n"
    others = [label for label in config.systems if label != config.reference]
    interval = f"[{100 * config.confidence:g} % interval]"
    head = ["other measures", "of", config.reference]
    head += [title for label in others for title in (label, f"{label} − {config.reference} {interval}")]
    rows = []
    for one in measured:
        row = [one.title, one.dataset if one.part == OVERALL else f"{one.dataset}, {one.part}"]
        row.append(_value(one, config.reference))
        for label in others:
            row += [_value(one, label), _difference(one, label)]
        rows.append(row)
    notes = (
        "ECE: distance between the mean probability of answers and their mean score, averaged over "
        f"{BINS} bins of equal width. Brier score: mean squared distance of the two. The probability is that "
        "of the whole answer, its end included. Items with an error do not count."
    )
    if all(one.name in (ECE, BRIER) for one in measured):
        return "\n".join([markdown_table(head, rows, left=(0, 1)), "", notes, ""])
    objects = "Objects: the image has those that its gold caption names."
    return "\n".join([markdown_table(head, rows, left=(0, 1)), "", notes, objects, ""])


def _value(one: Measured, label: str) -> str:
    if label not in one.values:
        return "not measured"
    return f"{100 * one.values[label]:.1f}" if one.percent else f"{one.values[label]:.3f}"


def _difference(one: Measured, label: str) -> str:
    if label not in one.differences:
        return ""
    found = one.differences[label]
    numbers = (found.difference, found.low, found.high)
    change, low, high = (f"{100 * n:+.1f}" if one.percent else f"{n:+.3f}" for n in numbers)
    return f"{change} [{low}, {high}]"


def measures_result(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return values and differences for the job's result: by system, dataset, slice and measure."""
    values: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for one in measured:
        for label, value in one.values.items():
            _into(values, label, one)[one.name] = round(value, 6)
        for label, found in one.differences.items():
            _into(differences, label, one)[one.name] = asdict(found)
    return {"measures": values, "measure_differences": differences}


def _into(tree: dict[str, Any], label: str, one: Measured) -> dict[str, Any]:
    leaf: dict[str, Any] = tree.setdefault(label, {}).setdefault(one.dataset, {}).setdefault(one.part, {})
    return leaf


def measures_metrics(measured: Sequence[Measured], label: str) -> dict[str, float]:
    """Return a system's measures as metrics: ``ece/<dataset>``, ``ece/<dataset>/<slice>``, and so on.

    ``ece_difference/…``, ``…_difference_low/…`` and ``…_difference_high/…`` compare with the reference.
    """
    metrics: dict[str, float] = {}
    for one in measured:
        where = one.dataset if one.part == OVERALL else f"{one.dataset}/{one.part}"
        if label in one.values:
            metrics[f"{one.name}/{where}"] = one.values[label]
        if label in one.differences:
            found = one.differences[label]
            metrics[f"{one.name}_difference/{where}"] = found.difference
            metrics[f"{one.name}_difference_low/{where}"] = found.low
            metrics[f"{one.name}_difference_high/{where}"] = found.high
    return metrics
