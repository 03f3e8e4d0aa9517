"""MathVista: extraction and comparison by the kind of answer."""

from __future__ import annotations

import pytest

from pipelines.score.dataset import read_dataset
from pipelines.score.points import Prediction, score_answers
from pipelines.score.rules.mathvista import mathvista
from tests.pipelines.score.tables import VISTA, png, table

FREE_FORM = {**VISTA, "question_type": "free_form", "answer_type": "integer", "answer": "14"}
MULTI = {**VISTA, "question_type": "multi_choice", "answer_type": "text", "answer": "x"}


@pytest.mark.parametrize(
    ("change", "answer", "points"),
    [
        ({"answer_type": "float", "answer": "0.6", "precision": "1"}, "About 0.64 of them", 1),
        ({"answer_type": "float", "answer": "1.45", "precision": "2.0"}, "$1,000.45", 0),
        ({"answer_type": "list", "answer": "[2007, 2008]"}, "[2007,2008]", 1),
        ({"answer_type": "text", "answer": "Bruno"}, "bruno", 1),
        ({"answer_type": "list", "answer": "[1, 2]"}, "{[]: 1}", 0),
        ({"answer_type": "list", "answer": "[1, 2]"}, "[" * 300, 0),
        ({"answer_type": "list", "answer": "[1, 2]"}, "-" * 5000 + "1", 0),
        (
            {
                "question_type": "multi_choice",
                "choices": "['3/11', '8/11']",
                "answer_option": "b",
                "answer": "8/11",
            },
            "The correct answer is (B) 8/11.",
            1,
        ),
        (
            {
                "question_type": "multi_choice",
                "choices": "['3/11', '8/11']",
                "answer_option": "",
                "answer": "8/11",
            },
            "3/11",
            0,
        ),
    ],
)
def test_answers_are_compared_by_their_type(change, answer, points, tmp_path):
    row = {**FREE_FORM, **change}
    file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(), **row}])
    dataset = read_dataset("MathVista_MINI", str(file))
    assert score_answers(dataset, {"1": Prediction(answer)}, "full").items[0].score == points


def test_an_answer_that_names_no_choice_is_wrong():
    assert mathvista({**MULTI, "choices": "['y', 'z']"}, "neither of them", None) == 0
