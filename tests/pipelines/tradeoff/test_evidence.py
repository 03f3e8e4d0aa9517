"""Further tables of a trade-off, from answers made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig

import skipvision as sv
from pipelines.evaluation.items import Item
from pipelines.tradeoff.config import TradeoffConfig
from pipelines.tradeoff.evidence import Evidence
from pipelines.tradeoff.points import Point
from pipelines.tradeoff.results import Measurements, PointResult
from pipelines.tradeoff.table import table
from pipelines.tradeoff.timing import Seconds

IMAGES = 20
GOLD = {"caption": "a small red circle at the top and the number 7 at the left.", "place": "top"}


def items(answers: dict[str, Sequence[str]], probability: float | None = -0.1) -> list[Item]:
    """Return one item for each image and task; each task's answers repeat over the images."""
    return [
        Item(
            *("test", f"{image}-{task}", "m", task, str(image)),
            (answer := some[image % len(some)]),
            float(answer == GOLD[task]),
            log_probability=probability,
        )
        for image in range(IMAGES)
        for task, some in answers.items()
    ]


RIGHT = items({task: [answer] for task, answer in GOLD.items()})
FULL = Point("a", (None, None), "full", None)
SKIP = Point("a", (None, None), "skip-vision", sv.SkipConfig(retained=4, skipped=4), (4, 4), 0.5)
NORM = Point("a", (None, None), "norm", sv.SkipConfig(retained=8, skipped=0), (8, 0), 0.5)
SMALL = Point("a", (None, None), "pixels", None, (4, 0), 0.5, 28)
SMALLER = replace(SMALL, kept=(1, 0), budget=None, side=14)


@pytest.fixture(scope="module")
def measurements(tiny_model: Path) -> Measurements:
    wrong = "a small blue star at the top and the number 7 at the left."
    skip = items({"caption": [GOLD["caption"], wrong], "place": ["top", "bottom"]})
    norm = items({"caption": [wrong], "place": ["top left"]})
    small = items({"caption": [GOLD["caption"], "", ""], "place": ["left"]})
    turns = {
        point: [item for item in some if item.group != "0"]  # without a partner
        for point, some in ((FULL, RIGHT), (SKIP, small))
    }
    answers = {FULL: RIGHT, SKIP: skip, NORM: norm, SMALL: small, SMALLER: norm}
    settings: dict[str, Any] = {
        "name": "n",
        "model": {"path": str(tiny_model)},
        "adapters": {"a": {}},
        "difficult": {"method": "pixels", "fraction": 0.5},
        "second_turn": ["skip-vision"],
    }
    times = {FULL: 1.0, SKIP: 0.5, NORM: 0.2, SMALL: 0.45, SMALLER: 0.25}
    return Measurements(
        TradeoffConfig(**settings),
        LlavaConfig.from_pretrained(tiny_model),
        20,
        {(point, seed): answers[point] for point in answers for seed in (0, 1)},
        {point: [Seconds(time, time / 4, 0.01, time / 2, 0.3 * time)] * 3 for point, time in times.items()},
        {(point, seed): turns[point] for point in turns for seed in (0, 1)},
        {("test", item.index): GOLD[item.category] for item in RIGHT},
        resamples=200,
    )


@pytest.fixture(scope="module")
def results(measurements: Measurements) -> dict[str, PointResult]:
    points = {"full": FULL, "skip": SKIP, "norm": NORM, "small": SMALL, "smaller": SMALLER}
    evidence = Evidence(measurements)
    return {name: evidence.added_to(measurements.result(point)) for name, point in points.items()}


def test_calibration_is_that_of_the_answers(results, measurements):
    found = results["skip"].evidence["calibration"]
    sure = 2.718281828459045**-0.1
    assert found["ECE"].value == pytest.approx(sure - 0.5)
    assert found["Brier score: − full"].difference.difference == pytest.approx((2 * sure - 1) / 2)
    assert "ECE: − full" not in results["full"].evidence["calibration"]
    old = {
        seeded: [replace(one, log_probability=None) for one in some]
        for seeded, some in measurements.items.items()
    }
    unknown = replace(measurements, items=old)
    columns = Evidence(unknown).added_to(unknown.result(SKIP)).evidence["calibration"]
    assert {cell.text for cell in columns.values()} == {"not measured"}


def test_objects_and_places_are_compared_with_full_tokens(results):
    objects = results["skip"].evidence["objects in captions"]
    assert objects["captions with a hallucinated object, %"].value == 0.5
    assert objects["missed objects per caption: − full"].difference.difference == 0.5
    places = results["norm"].evidence["places"]
    assert places["distance, % of the image's side"].value == pytest.approx(1 / 3)
    assert places["neither the cell nor a neighbour, %"].value == 0


def test_items_are_difficult_if_the_chosen_point_has_them_wrong(results):
    """The smaller image has 7 of 20 captions right and no place."""
    full, skip, norm = (results[name].evidence["difficult items"] for name in ("full", "skip", "norm"))
    assert list(full) == ["difficult (33 items)", "others (7 items)"]
    assert full["difficult (33 items)"].value == 1
    small = results["small"].evidence["difficult items"]
    assert (small["difficult (33 items)"].value, small["others (7 items)"].value) == (0, 1)
    gap = skip["difficult (33 items): − full"].difference
    assert gap.low < gap.difference < gap.high < 0
    rival = norm["difficult (33 items): Skip-Vision − this"].difference
    assert rival.difference == pytest.approx(skip["difficult (33 items)"].value)
    assert "difficult items" not in results["full"].evidence.get("places", {})


def test_second_turns_are_compared_with_the_first_and_with_full_tokens(results):
    found = results["skip"].evidence["second turn"]
    assert found["asked second"].value == pytest.approx(6 / 38)
    assert found["asked first"].value == pytest.approx(18 / 38)
    assert found["second − first"].difference.difference == pytest.approx(-12 / 38)
    assert "second turn" not in results["norm"].evidence


def test_an_image_that_is_as_fast_is_found_for_each_method(results):
    skip, norm = (results[name].evidence["smaller images at equal seconds"] for name in ("skip", "norm"))
    assert (skip["image"].text, skip["its time, %"].value) == ("28 px", 0.45)
    assert skip["this − image"].difference.difference == pytest.approx(20 / 40 - 7 / 40)
    assert norm["image"].text == "none is as fast"
    assert "smaller images at equal seconds" not in results["small"].evidence


def test_times_have_parts_in_units_of_full_tokens(results):
    assert results["skip"].parts == pytest.approx((0.125, 0.01, 0.25, 0.5))
    assert results["skip"].latency == 0.5


def test_the_tables_show_it(results):
    text = table(list(results.values()), rows=40, text_tokens=20)
    assert (
        "| method | kept | FLOPs | with tower | KV | latency | tower | selection | prefill | decode |" in text
    )
    assert "| skip-vision | 4 + 4 |" in text
    for title in ("calibration", "objects in captions", "places", "difficult items", "second turn"):
        assert f"**a**: {title}" in text
    line = next(line for line in text.splitlines() if line.startswith("| skip-vision") and "28 px" in line)
    assert "| 50.0 | 28 px | 45.0 | 17.5 | +32.5 [" in line
    assert "| pixels | 4 + 0 |" in text


def test_answers_that_differ_from_skip_vision_are_counted_by_task(results):
    """Skip-Vision has every second answer right, norm none, the smaller image 7 captions, twice."""
    norm, small = (
        results[name].evidence["answers that differ from Skip-Vision"] for name in ("norm", "small")
    )
    assert [norm[task].text for task in ("caption", "place", "overall")] == ["20 : 0", "20 : 0", "40 : 0"]
    assert [small[task].text for task in ("caption", "place", "overall")] == ["12 : 6", "20 : 0", "32 : 6"]
    found = small["Skip-Vision − this"].difference
    assert found.difference == pytest.approx(26 / 80)
    assert small["detectable"].value == pytest.approx((found.high - found.low) / 2 * 2.8016 / 1.96, rel=1e-3)
    assert "answers that differ from Skip-Vision" not in results["skip"].evidence
    assert "answers that differ from Skip-Vision" not in results["full"].evidence
