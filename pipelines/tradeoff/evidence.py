"""Further tables of a trade-off: all but the second turns are computed from the answers of its points.

Each table has columns by title; a point without a table, or without a column, has an empty cell there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pipelines.evaluation.calibration import calibration, compare_calibration, is_measured
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.measures import Measure, compare_measure
from pipelines.evaluation.objects import SHAPES_CAPTIONS, ObjectWords
from pipelines.evaluation.paired import FEW_CHANGES, Sides, aligned, detectable, widened
from pipelines.evaluation.places import place_measures
from pipelines.tradeoff.config import GRID, PIXELS
from pipelines.tradeoff.points import Point
from pipelines.tradeoff.results import Cell, Measurements, PointResult

Columns = dict[str, Cell]

CALIBRATION, OBJECTS, PLACES = "calibration", "objects in captions", "places"
DIFFICULT, SECOND_TURN, EQUAL_SECONDS = "difficult items", "second turn", "smaller images at equal seconds"
RIVALRY = "answers that differ from Skip-Vision"
NO_GAP, RIVAL = ": − full", ": Skip-Vision − this"


class Evidence:
    """The further tables of all points.

    Args:
        measurements: the inputs of all results.
    """

    def __init__(self, measurements: Measurements) -> None:
        self._measurements = measurements
        self._objects = _object_measures(measurements)
        self._places = place_measures(measurements.gold)
        self._difficult = {
            adapter: _difficult_measures(measurements, adapter) for adapter in measurements.config.adapters
        }

    def added_to(self, result: PointResult) -> PointResult:
        """Return a point's result with its further tables; points of the grid have none."""
        measurements, point = self._measurements, result.point
        if point.method == GRID:
            return result
        tables = {
            CALIBRATION: _calibration(measurements, point),
            OBJECTS: _compared(measurements, point, self._objects),
            PLACES: _compared(measurements, point, self._places),
            DIFFICULT: _compared(measurements, point, self._difficult[point.adapter], rival=True),
            SECOND_TURN: _second_turn(measurements, point),
            RIVALRY: _against_skip_vision(measurements, point),
            EQUAL_SECONDS: _equal_seconds(measurements, point),
        }
        return replace(result, evidence={title: columns for title, columns in tables.items() if columns})


def _compared(
    measurements: Measurements, point: Point, measures: Sequence[Measure], *, rival: bool = False
) -> Columns:
    """Return the value of each measure, its difference to full tokens, and that of Skip-Vision to it."""
    columns: Columns = {}
    for measure in measures:
        found = compare_measure(measure, measurements.sides(point), resamples=measurements.resamples)
        if found is None:
            continue
        columns[measure.title] = Cell(found.other, percent=measure.percent)
        if point != measurements.reference(point):
            columns[measure.title + NO_GAP] = Cell(difference=found, percent=measure.percent)
        if rival and (sides := measurements.rival(point)) is not None:
            ahead = compare_measure(measure, sides, resamples=measurements.resamples)
            columns[measure.title + RIVAL] = Cell(difference=ahead)
    return columns


def _calibration(measurements: Measurements, point: Point) -> Columns:
    sides = measurements.sides(point)
    if not all(is_measured(own) for _, own in sides):
        return {"ECE": Cell(text="not measured"), "Brier score": Cell(text="not measured")}
    found = [one for _, own in sides if (one := calibration(own))]
    columns = {
        "ECE": Cell(sum(one.ece for one in found) / len(found), percent=False),
        "Brier score": Cell(sum(one.brier for one in found) / len(found), percent=False),
    }
    compared = compare_calibration(sides, resamples=measurements.resamples)
    if compared is not None and point != measurements.reference(point):
        for title, difference in zip(tuple(columns), compared, strict=True):
            columns[title + NO_GAP] = Cell(difference=difference, percent=False)
    return columns


def _object_measures(measurements: Measurements) -> list[Measure]:
    words = SHAPES_CAPTIONS
    if measurements.config.objects is not None:
        words = ObjectWords(measurements.config.objects, part=words.part)
    named = any(words.named_in(answer) for answer in measurements.gold.values())
    return words.measures(measurements.gold) if named else []


def _difficult_measures(measurements: Measurements, adapter: str) -> list[Measure]:
    """Return accuracy on the items that most seeds of the configured point have wrong, and on the others."""
    chosen = measurements.config.difficult
    if chosen is None:
        return []
    same = (adapter, chosen.method, chosen.fraction)
    sides = [
        items
        for (one, _), items in measurements.items.items()
        if (one.adapter, one.method, one.budget) == same
    ]
    wrong = Counter(item.index for items in sides for item in items if item.score < 1)
    difficult = {index for index, count in wrong.items() if 2 * count > len(sides)}

    def accuracy(title: str, *, hard: bool) -> Measure:
        def value(item: Item) -> float | None:
            return item.score if (item.index in difficult) == hard else None

        return Measure(title, title, value)

    total = len({item.index for items in sides for item in items})
    return [
        accuracy(f"difficult ({len(difficult)} items)", hard=True),
        accuracy(f"others ({total - len(difficult)} items)", hard=False),
    ]


def _second_turn(measurements: Measurements, point: Point) -> Columns:
    turns = measurements.second_turns
    if (point, 0) not in turns:
        return {}
    seeds = range(len(point.paths))
    moved: Sides = [
        (_only(measurements.items[point, seed], turns[point, seed]), turns[point, seed]) for seed in seeds
    ]
    if not moved[0][1]:
        return {}
    shift = widened(measurements.paired(moved))
    columns = {
        "asked first": Cell(shift.reference),
        "asked second": Cell(shift.other),
        "second − first": Cell(difference=shift.numbers()),
    }
    if point.skip is not None and point.skip.criterion.sees_prompt:
        columns["plan"] = Cell(text="reads both questions")
    if point != measurements.reference(point):
        gap = widened(measurements.paired(measurements.sides(point, turns))).numbers()
        columns["asked second" + NO_GAP] = Cell(difference=gap)
    return columns


def _only(items: Sequence[Item], others: Sequence[Item]) -> list[Item]:
    keys = {item.index for item in others}
    return [item for item in items if item.index in keys]


def _equal_seconds(measurements: Measurements, point: Point) -> Columns:
    """Compare a point with the largest smaller image whose measured time to the first token is no longer."""
    own = measurements.latency(point)
    if own is None or point.side is not None:
        return {}
    fast = max(
        _no_slower(measurements, point.adapter, own[1]), key=lambda one: one[0].side or 0, default=None
    )
    if fast is None:
        return {"image": Cell(text="none is as fast")}
    image, latency = fast
    sides = [
        (measurements.items[image, seed], measurements.items[point, seed]) for seed in range(len(point.paths))
    ]
    found = widened(measurements.paired(sides)).numbers()
    return {
        "time, %": Cell(own[1]),
        "image": Cell(text=f"{image.side} px"),
        "its time, %": Cell(latency),
        "its accuracy": Cell(found.reference),
        "this − image": Cell(difference=found),
    }


def _against_skip_vision(measurements: Measurements, point: Point) -> Columns:
    """Count the answers that one of two points alone has right, and say what their comparison can show."""
    sides = measurements.rival(point)
    if sides is None:
        return {}
    pairs, _ = aligned(sides)
    both = [pair for this, rival in pairs for pair in zip(this, rival, strict=True)]
    columns = {}
    for task in [*sorted({this.category for this, _ in both} - {""}), OVERALL]:
        own = [(this, rival) for this, rival in both if task in (OVERALL, this.category)]
        rival_alone = sum(this.score < rival.score for this, rival in own)
        this_alone = sum(this.score > rival.score for this, rival in own)
        columns[task] = Cell(text=f"{rival_alone} : {this_alone}")
    found = widened(measurements.paired(sides))
    columns["Skip-Vision − this"] = Cell(difference=found.numbers())
    smallest = detectable(found)
    columns["detectable"] = Cell(smallest)
    if found.changed >= FEW_CHANGES and abs(found.difference) > 1e-9:
        questions = len(pairs[0][0]) * (smallest / found.difference) ** 2
        columns["questions to show it"] = Cell(text=f"{float(f'{questions:.1e}'):,.0f}")
    return columns


def _no_slower(measurements: Measurements, adapter: str, limit: float) -> Iterator[tuple[Point, float]]:
    """Yield the smaller images under an adapter whose median time is within a limit."""
    for point in measurements.seconds:
        found = measurements.latency(point)
        smaller = point.side is not None and point.method.startswith(PIXELS)
        if point.adapter == adapter and smaller and found is not None and found[1] <= limit:
            yield point, found[1]


def columns_of(results: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return the columns of a table, in the order of the row that has most."""
    longest = max(results, key=len)
    return [*longest, *(title for row in results for title in row if title not in longest)]
