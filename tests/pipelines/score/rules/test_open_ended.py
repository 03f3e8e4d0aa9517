"""Open questions, as MMMU scores them."""

from __future__ import annotations

import pytest

from pipelines.score.rules.open_ended import open_answer


@pytest.mark.parametrize(
    ("answer", "golds", "points"),
    [
        ("15", ["5"], 0.0),
        ("I say 0.25", ["5"], 0.0),
        ("1,000", ["1000"], 1.0),
        ("0.334", ["1/3", "0.33"], 1.0),  # compared with two digits
        ("3.43", ["24/7", "3.429"], 1.0),
        ("x = 4\ny = 24/7", ["24/7"], 1.0),
        ("6 = x\ny = 24/7", ["6"], 0.0),  # only the last line's "=" counts
        ("So it is 6e3", ["6000"], 1.0),
        ("The answer is: the Boston Tea Party.", ["boston tea party"], 1.0),
        ("The tea is cold, so it could be Boston", ["tea"], 0.0),
        ("Boston", ["b"], 0.0),
        ("vitamin B or C", ["b"], 1.0),
        ("", ["b"], 0.0),
    ],
)
def test_a_conclusion_of_the_answer_contains_a_gold_answer(answer, golds, points):
    assert open_answer(answer, golds) == points
