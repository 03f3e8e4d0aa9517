"""Measures besides the score: objects in captions, places by coordinates, and how they are compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.evaluation.items import Item
from pipelines.evaluation.measures import Measure, compare_measure, mean_of
from pipelines.evaluation.objects import SHAPES_CAPTIONS, ObjectWords
from pipelines.evaluation.places import place_measures
from pipelines.shapes import scenes

TRUE = "a small red circle at the top, the number 41 at the left and a large red circle at the right."


def item(prediction: str, category: str = "caption", index: str = "1") -> Item:
    return Item("data", index, "one", category, index, prediction, 0.0)


def values(words: ObjectWords, prediction: str, true: str) -> list[float | None]:
    return [measure.value(item(prediction)) for measure in words.measures({("data", "1"): true})]


@pytest.mark.parametrize(
    ("caption", "hallucinated", "missed"),
    [
        (TRUE, 0, 0),
        (TRUE.replace("large", "small").replace("41", "7").replace("top", "bottom"), 0, 0),
        ("A small RED  circle at the top.", 0, 1),
        ("a red circle, a red circle and a red circle", 1, 0),
        ("a small blue circle at the top and a large red circle at the right.", 1, 1),
        ("a red square and a blue star", 2, 2),
        ("a red at the circle", 0, 2),
        ("", 0, 2),
    ],
)
def test_objects_of_shapes_captions_are_counted_by_colour_and_shape(caption, hallucinated, missed):
    shares = [float(hallucinated > 0), float(missed > 0)]
    expected = [shares[0], hallucinated, shares[1], missed]
    assert values(SHAPES_CAPTIONS, caption, TRUE) == expected


def test_every_shapes_caption_names_exactly_its_objects():
    for index in range(40):
        scene, _ = scenes.sample_scene(0, "test", index)
        named = SHAPES_CAPTIONS.named_in(scenes.caption(scene))
        assert sorted(named.elements()) == sorted(f"{one.colour} {one.shape}" for one in scene.things)


def test_words_of_ones_own_count_once_and_in_the_plural():
    words = ObjectWords(("dog", "hot dog", "bus"))
    true = "Two dogs wait for the bus. A dog sleeps."
    assert values(words, "A dog, another dog, and buses", true) == [0, 0, 0, 0]
    assert values(words, "A hot dog on a busy street", true) == [1, 1, 1, 2]
    assert SHAPES_CAPTIONS.measures({("data", "1"): TRUE})[0].value(item("red", "colour")) is None


@pytest.mark.parametrize(
    ("answer", "distance", "far"),
    [
        ("top left", 0, 0),
        ("Top", 1 / 3, 0),
        ("centre", math.sqrt(2) / 3, 0),
        ("top right", 2 / 3, 1),
        ("bottom right", math.sqrt(8) / 3, 1),
        ("somewhere", math.sqrt(8) / 3, 1),
    ],
)
def test_places_are_compared_by_the_centres_of_their_cells(answer, distance, far):
    found = [one.value(item(answer, "place")) for one in place_measures({("data", "1"): "top left"})]
    assert found == pytest.approx([distance, far])


def test_an_unreadable_place_is_as_far_as_the_cell_allows():
    [distance, _] = place_measures({("data", "1"): "centre"})
    assert distance.value(item("nowhere", "place")) == pytest.approx(math.sqrt(2) / 3)
    assert distance.value(item("centre", "colour")) is None
    assert place_measures({("data", "1"): "on the table"})[0].value(item("top", "place")) is None


def test_a_measure_is_compared_on_the_items_that_both_sides_have():
    length = Measure("length", "length", lambda one: float(len(one.prediction)) or None, percent=False)
    before = [item("abc", index=str(n)) for n in range(30)]
    after = [item("abcde" if n % 2 else "abc", index=str(n)) for n in range(30)]
    found = compare_measure(length, [(before, after)])
    assert (found.reference, found.other, found.difference) == pytest.approx((3, 4, 1))
    assert 0.5 < found.low < 1 < found.high < 1.5
    assert mean_of(length, after) == pytest.approx(4)
    fewer = compare_measure(length, [(before, [*after[:20], replace(after[20], prediction=""), *after[21:]])])
    assert fewer.reference == pytest.approx(3)
    assert compare_measure(length, [(before, [replace(one, prediction="") for one in after])]) is None
    assert mean_of(length, [item("")]) is None


def test_the_bounds_of_a_few_changes_are_in_the_units_of_the_measure():
    """Of 200 captions, three name four more objects: exact bounds of the changed images, times four."""
    count = Measure("count", "count", lambda one: float(len(one.prediction)), percent=False)
    before = [item("", index=str(n)) for n in range(200)]
    after = [item("abcd" if n < 3 else "", index=str(n)) for n in range(200)]
    found = compare_measure(count, [(before, after)])
    assert found.difference == pytest.approx(0.06)
    assert found.high == pytest.approx(4 * 0.0432, abs=2e-3)
    assert np.sign(found.low) <= 0
