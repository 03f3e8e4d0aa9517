"""Every benchmark, through a table as VLMEvalKit stores it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.evaluation.gate import slice_of
from pipelines.score.benchmarks import BENCHMARKS
from pipelines.score.dataset import read_dataset
from pipelines.score.points import Prediction, by_category, mean_score, score_answers
from skipvision.errors import DataError
from tests.pipelines.score.tables import CHOICE, PEOPLE, PLAIN, VISTA, png, table

CASES = {
    "MMBench_DEV_EN": (CHOICE, [("B", 1), ("dog", 1), ("A", 0)]),
    "MMStar": (CHOICE, [("The answer is B", 1), ("C", 0)]),
    "MMMU_DEV_VAL": ({**CHOICE, "split": "validation"}, [("B", 1), ("cat", 0)]),
    "ScienceQA_TEST": (CHOICE, [("b", 0), ("B.", 1)]),
    "AI2D_TEST": (CHOICE, [("B: dog", 1), ("A", 0)]),
    "MME": ({**PLAIN, "answer": "Yes", "category": "color"}, [("Yes, no dog", 1), ("no", 0), ("perhaps", 0)]),
    "POPE": ({**PLAIN, "answer": "No", "category": "random,popular"}, [("No.", 1), ("Yes, no.", 0)]),
    "TextVQA_VAL": ({**PLAIN, "answer": str(PEOPLE)}, [("red", 1), ("green", 0.6)]),
    "OCRBench": ({**PLAIN, "answer": "['STOP', 'halt']"}, [("It says stop", 1), ("go", 0)]),
    "GQA_TestDev_Balanced": ({**PLAIN, "answer": "left"}, [("Left", 1), ("to the left", 0)]),
    "ChartQA_TEST": ({**PLAIN, "answer": "['40']", "split": "test_human"}, [("41", 1), ("43", 0)]),
    "DocVQA_VAL": ({**PLAIN, "answer": "['abcd']"}, [("abce", 0.75), ("x", 0)]),
    "MathVista_MINI": (
        {**VISTA, "question_type": "free_form", "answer_type": "integer", "answer": "14"},
        [("The number missing is 14.", 1), ("14.0", 1), ("15", 0), ("no idea", 0)],
    ),
    "Shapes": ({**PLAIN, "answer": "bottom left"}, [("Bottom  left", 1), ("left", 0)]),
}


def test_every_benchmark_has_a_case():
    names = {benchmark.pattern for benchmark in BENCHMARKS if not benchmark.rule.needs_judge}
    assert len(CASES) == len(names)


@pytest.mark.parametrize("name", CASES)
def test_points_of_each_benchmark(name, tmp_path):
    row, answers = CASES[name]
    file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(), **row}])
    dataset = read_dataset(name, str(file))
    for answer, points in answers:
        scored = score_answers(dataset, {"1": Prediction(answer)}, "full")
        assert [item.score for item in scored.items] == [pytest.approx(points)], answer
    (item,) = score_answers(dataset, {}, "full").items
    assert (item.score, item.error) == (0, "there is no answer to it")


MULTI = {**VISTA, "question_type": "multi_choice", "answer_type": "text", "answer": "x"}


FREE = {**VISTA, "question_type": "free_form", "answer_type": "integer", "answer": "3"}


@pytest.mark.parametrize(
    ("name", "right", "change", "error"),
    [
        ("MathVista_MINI", FREE, {**MULTI, "choices": "oops"}, "`choices` is not a list of options: 'oops'"),
        ("MathVista_MINI", FREE, {**MULTI, "choices": "'xyz'"}, "`choices` is not a list of options"),
        ("MathVista_MINI", FREE, {**MULTI, "choices": "[]"}, "gold answer 'x' is none of the choices []"),
        (
            "MathVista_MINI",
            FREE,
            {**MULTI, "choices": "['y', 'z']"},
            "gold answer 'x' is none of the choices",
        ),
        ("MathVista_MINI", FREE, {"answer": "three"}, "gold answer 'three' is no integer"),
        ("MMStar", CHOICE, {"answer": "dog"}, "gold answer 'dog' is not the letter of an option: A, B"),
        (
            "POPE",
            {**PLAIN, "answer": "No", "category": "random"},
            {"answer": "1"},
            "'1' is neither yes nor no",
        ),
    ],
)
def test_an_unusable_gold_answer_is_an_error_of_its_item(name, right, change, error, tmp_path):
    rows = [{"index": n, "image": png(n), **right, **given} for n, given in enumerate([{}, change])]
    dataset = read_dataset(name, str(table(tmp_path / "table.tsv", rows)))
    said = {str(n): Prediction(str(change.get("answer", "A"))) for n in range(2)}
    good, bad = score_answers(dataset, said, "full").items
    assert good.error is None
    assert bad.score == 0
    assert error in bad.error
    with pytest.raises(DataError, match="none of 1 rows can be scored"):
        read_dataset(name, str(table(tmp_path / "table.tsv", rows[1:])))


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [("MMStar", {**CHOICE, "answer": "b "}, "B"), ("POPE", {**PLAIN, "answer": "YES"}, "yes")],
)
def test_the_case_of_a_gold_answer_is_ignored(name, row, answer, tmp_path):
    file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(), "category": "", **row}])
    assert score_answers(read_dataset(name, str(file)), {"1": Prediction(answer)}, "full").items[0].score == 1


def test_a_circular_question_needs_all_its_rotations_right(tmp_path):
    rows = [
        {"index": 7, "image": png(), **CHOICE},
        {"index": 8, "image": 7, **CHOICE, "question": "And what is this?"},
        {"index": 9, "image": png(1), **CHOICE},
        {"index": 1000007, "image": 7, **CHOICE, "A": "dog", "B": "cat", "answer": "A"},
        {"index": 1000008, "image": 7, **CHOICE, "A": "dog", "B": "cat", "answer": "A"},
    ]
    dataset = read_dataset("MMBench_DEV_EN", str(table(tmp_path / "table.tsv", rows)))
    said = {"7": "B", "8": "B", "1000007": "A", "1000008": "B"}
    items = score_answers(dataset, {k: Prediction(v) for k, v in said.items()}, "full").items
    assert [(item.index, item.score, item.prediction) for item in items] == [
        ("7", 1.0, "B | A"),
        ("8", 0.0, "B | B"),
        ("9", 0.0, ""),
    ]
    first, second, third = (item.group for item in items)
    assert first == second != third  # questions about one image are one group
    assert len(read_dataset("MMBench_DEV_EN", dataset.file, limit=1).questions) == 2


def test_the_totals_of_mme(tmp_path):
    row = {**PLAIN, "answer": "Yes", "category": "color"}
    rows = [
        {"index": 1, "image": png(), **row},
        {"index": 2, "image": 1, **row, "answer": "No"},
        {"index": 3, "image": png(1), **row},
        {"index": 4, "image": 3, **row, "answer": "No"},
        {"index": 5, "image": png(2), **row, "category": "text_translation"},
    ]
    dataset = read_dataset("MME", str(table(tmp_path / "table.tsv", rows)))
    said = {"1": "yes", "2": "no", "3": "yes", "4": "yes", "5": "no"}
    answers = {k: Prediction(v) for k, v in said.items()}
    assert score_answers(dataset, answers, "full").totals == {}  # the totals are sums over 2,374 rows
    whole = replace(dataset, benchmark=replace(dataset.benchmark, rows=5))
    scored = score_answers(whole, answers, "full")
    assert scored.totals == {
        "perception": 75 + 50,
        "cognition": 0,
        "score/color": 125,
        "score/text_translation": 0,
    }
    assert mean_score(scored.items) == 3 / 5
    assert len({item.group for item in scored.items}) == 3  # one image, one group


def test_the_totals_of_pope(tmp_path):
    truths = ["Yes", "Yes", "Yes", "No", "No"]
    rows = [
        {
            "index": n,
            "image": png(n),
            **PLAIN,
            "answer": truth,
            "category": "random, popular" if n else "random",
        }
        for n, truth in enumerate(truths)
    ]
    dataset = read_dataset("POPE", str(table(tmp_path / "table.tsv", rows)))
    said = dict(zip("01234", ["yes", "yes", "no", "yes", "maybe"], strict=True))
    scored = score_answers(dataset, {k: Prediction(v) for k, v in said.items()}, "full")
    assert scored.totals == {
        "f1": pytest.approx(3 / 5),  # over nine rows: five random ones, four popular ones
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 5),
        "yes_ratio": 5 / 9,
        "f1/popular": pytest.approx(1 / 2),
        "f1/random": pytest.approx(2 / 3),
    }
    assert {name: len(items) for name, items in by_category(scored.items).items()} == {
        "popular": 4,
        "random": 5,
    }
    assert len(slice_of(scored.items, "popular")) == len(slice_of(scored.items, "POPE/popular")) == 4


def test_mmmu_scores_its_validation_questions_with_and_without_options(tmp_path):
    rows = [
        {"index": "a", "image": png(), **CHOICE, "split": "dev"},
        {"index": "b", "image": png(1), **CHOICE, "split": "validation", "A": "", "B": "", "answer": "12 m"},
    ]
    dataset = read_dataset("MMMU_DEV_VAL", str(table(tmp_path / "table.tsv", rows)))
    assert [question.index for question in dataset.questions] == ["b"]
    assert score_answers(dataset, {"b": Prediction("It is 12 m long")}, "full").items[0].score == 1


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        (
            "MMStar",
            CHOICE,
            "What is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
        ),
        (
            "MMMU_DEV_VAL",
            {**CHOICE, "A": "", "B": ""},
            "What is it?\nAnswer the question using a single word or phrase.",
        ),
        (
            "GQA_TestDev_Balanced",
            {**PLAIN, "answer": "x"},
            "What is it?\nAnswer the question using a single word or phrase.",
        ),
        ("POPE", {**PLAIN, "answer": "Yes"}, "What is it?\nPlease answer yes or no."),
        (
            "MME",
            {"question": "Is it red? Please answer yes or no.", "answer": "Yes"},
            "Is it red? Please answer yes or no.",
        ),
        ("OCRBench", {**PLAIN, "answer": "x"}, "What is it?"),
    ],
)
def test_the_instruction_follows_the_question(name, row, prompt, tmp_path):
    file = str(table(tmp_path / "table.tsv", [{"index": 1, "image": png(), **row}]))
    (question,) = read_dataset(name, file).questions
    assert question.messages[0].text == f"<image>{prompt}"
    (question,) = read_dataset(name, file, instruction="Be {brief}.").questions
    assert question.messages[0].text.endswith("\nBe {brief}.")
    assert "Answer" not in question.messages[0].text
