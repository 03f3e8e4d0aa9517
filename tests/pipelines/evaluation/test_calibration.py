"""Calibration of answers: small cases by hand, and intervals against a bootstrap in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.evaluation.calibration import calibration, compare_calibration
from pipelines.evaluation.items import Item


def items(answers: list[tuple[float, float]], *, per_group: int = 1) -> list[Item]:
    """Return one item for each (probability, score)."""
    return [
        Item(
            *("data", str(number), "one", "", str(number // per_group), "", float(score)),
            log_probability=math.log(probability),
        )
        for number, (probability, score) in enumerate(answers)
    ]


def test_a_small_case_agrees_with_pen_and_paper():
    found = calibration(items([(0.92, 1), (0.98, 0), (0.25, 1), (0.31, 0), (1.0, 1)]))
    # The last bin has 0.92 + 0.98 + 1 for two right answers; two others have one answer each.
    assert found.ece == pytest.approx((0.9 + 0.75 + 0.31) / 5)
    assert found.brier == pytest.approx((0.08**2 + 0.98**2 + 0.75**2 + 0.31**2) / 5)
    assert found.items == 5


def test_unknown_probabilities_are_not_measured_and_errors_do_not_count():
    some = items([(0.9, 1), (0.5, 0)])
    assert calibration([]) is None
    assert calibration([some[0], replace(some[1], log_probability=None)]) is None
    failed = replace(some[1], log_probability=None, error="corrupt")
    assert calibration([some[0], failed]) == calibration(some[:1])
    assert compare_calibration([(some, [some[0], replace(some[1], log_probability=None)])]) is None
    ece, brier = compare_calibration([(some, [some[0], failed])])
    assert (ece.reference, ece.other) == pytest.approx((0.1, 0.1))
    assert (brier.difference, brier.reference) == pytest.approx((0, 0.01))


def test_the_interval_is_that_of_resampled_images():
    rng = np.random.default_rng(3)
    right = rng.random(240) < 0.6
    sure, honest = ([(p, score) for score in right] for p in (0.97, 0.58))
    pairs = [(items(sure, per_group=4), items(honest, per_group=4))]
    ece, brier = compare_calibration(pairs)
    assert ece.difference == pytest.approx(calibration(pairs[0][1]).ece - calibration(pairs[0][0]).ece)
    assert (ece.reference, ece.other) == pytest.approx([calibration(side).ece for side in pairs[0]])
    assert ece.low < ece.difference < ece.high < 0
    assert brier.low < brier.difference < brier.high < 0
    differences = []
    for _ in range(250):
        drawn = [4 * group + one for group in rng.integers(0, 60, 60) for one in range(4)]
        before, after = (calibration([side[n] for n in drawn]).ece for side in pairs[0])
        differences.append(after - before)
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (ece.low, ece.high) == pytest.approx((low, high), abs=0.03)


def test_seeds_are_averaged_and_a_few_images_leave_everything_open():
    first, second = items([(0.9, 1), (0.9, 0)]), items([(0.6, 1), (0.6, 0)])
    ece, brier = compare_calibration([(first, first), (first, second)])
    assert ece.reference == pytest.approx(0.4)
    assert ece.other == pytest.approx((0.4 + 0.1) / 2)
    assert (ece.low, ece.high) == (-1, 1)
    assert brier.low < brier.difference < brier.high
