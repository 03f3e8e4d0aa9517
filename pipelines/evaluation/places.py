"""Places by coordinates: how far the answered cell of a shapes image is from the right one.

A model that learnt nine words for places cannot be prompted for coordinates, and rows hold no others. So the
centre of the answered cell is compared with the centre of the right one.
"""

from __future__ import annotations

import math

from pipelines.data.shapes_words import PLACES
from pipelines.evaluation.exact_match import normalised
from pipelines.evaluation.items import Item
from pipelines.evaluation.measures import Gold, Measure, gold_of

_SIDE = 3


def place_measures(gold: Gold, part: str = "place") -> list[Measure]:
    """Return the measures of answers that are places: the distance to the right cell, and far misses."""

    def distance(item: Item) -> float | None:
        true = gold_of(item, gold, part)
        return None if true is None else _distance(normalised(item.prediction), normalised(true))

    def far(item: Item) -> float | None:
        found = distance(item)
        return None if found is None else float(found > math.sqrt(2) / _SIDE + 1e-9)

    return [
        Measure("place_distance", "distance, % of the image's side", distance, part),
        Measure("place_far", "neither the cell nor a neighbour, %", far, part),
    ]


def _distance(answered: str, true: str) -> float | None:
    """Return the distance of two cells' centres as a fraction of the image's side; None without a true cell.

    An answer that is no place is as wrong as possible: it gets the largest distance to the true cell.
    """
    if true not in PLACES:
        return None
    where = _centre(true)
    answers = [answered] if answered in PLACES else PLACES
    return max(math.dist(_centre(place), where) for place in answers)


def _centre(place: str) -> tuple[float, float]:
    row, column = divmod(PLACES.index(place), _SIDE)
    return (column + 0.5) / _SIDE, (row + 0.5) / _SIDE
