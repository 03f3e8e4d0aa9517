"""Points by the rules of the benchmarks, worked out by hand, and through the tables that people have."""

from __future__ import annotations

import base64
import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipelines.evaluation.gate import slice_of
from pipelines.score.benchmarks import BENCHMARKS
from pipelines.score.dataset import read_dataset
from pipelines.score.points import Answered, by_category, mean_score, score_answers
from pipelines.score.rules import short_answer as short_answers
from pipelines.score.rules.mathvista import mathvista
from pipelines.score.rules.multiple_choice import chosen_option
from pipelines.score.rules.open_ended import open_answer
from pipelines.score.rules.short_answer import (
    anls,
    edit_distance,
    normalised_for_vqa,
    vqa_accuracy,
    yes_or_no,
    yes_or_no_at_first,
)
from skipvision.errors import DataError

OPTIONS = {"A": "cat", "B": "dog", "C": "red bird", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("The best choice is **C**.", "C"),
        ("A dog is in the picture here", "B"),  # this A is an article: too far from the end
        ("The answer is D, as neither a cat nor a dog is to be seen", "D"),
        ("It is a Red Bird", "C"),
        ("A or B", None),
        ("cat or dog", None),
        ("The answer is a dog.", "B"),
        ("The answer is A dog.", "A"),  # as VLMEvalKit: the only letter among the last four words
        ("The answer is A dog that runs about in the garden", "B"),
        ("So the answer is: (C)! It flies, it is small, and it is red", "C"),
        ("E", None),
        ("I cannot tell", None),
        ("a dog, " + "which I say at great length " * 10, None),
        ("", None),
    ],
)
def test_the_option_that_is_meant(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes, it is.", "Yes"), ("NO", "No"), ("yes and no", None), ("It is not.", None), ("nothing", None)],
)
def test_yes_or_no(answer, word):
    assert yes_or_no(answer) == word


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes, there is no dog.", "Yes"),
        ("Yes. No doubt about it.", "Yes"),
        (" NO", "No"),
        ("**Yes**", None),  # the fourth character is its e
        ("Not yes", "No"),
        ("It is, yes", None),
    ],
)
def test_yes_or_no_as_mme_reads_it(answer, word):
    assert yes_or_no_at_first(answer) == word


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dogs.", "dogs"),
        ("two an apple", "2 apple"),
        ("none", "0"),
        ("3.5 m.", "3.5 m"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("dont", "don't"),
        ("it's 5 o'clock", "it's 5 o'clock"),
        ("a\n b\tc", "b c"),
        ("a-b;-c", "b c"),  # a mark is beside a blank only where it was so before other marks became blanks
        ("a/-b-c", "b c"),
        ("10,000?yes", "10000yes"),
    ],
)
def test_answers_as_vqa_compares_them(answer, normal):
    assert normalised_for_vqa(answer) == normal


PEOPLE = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["a dog"]


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("Red", 1.0),
        ("blue", (3 * 2 / 3 + 7) / 10),
        ("green", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("dog", 9 * 1 / 3 / 10),
        ("cat", 0.0),
    ],
)
def test_vqa_accuracy(answer, points):
    assert vqa_accuracy(answer, PEOPLE) == pytest.approx(points)


@pytest.mark.parametrize(
    ("rule", "answer", "golds", "points"),
    [
        ("vqa_accuracy", "two", ["2"], 1.0),
        ("anls", "ABCD", ["abcd"], 1.0),
        ("anls", "abce", ["abcd"], 0.75),
        ("anls", "abzz", ["abcd"], 0.0),  # half of it wrong
        ("anls", "abce", ["xxxx", "abcef"], 0.8),
        ("anls", "a  b", ["a b"], 1.0),
        ("relaxed_accuracy", "105", ["100"], 1.0),
        ("relaxed_accuracy", "105.1", ["100"], 0.0),
        ("relaxed_accuracy", "-95", ["-100"], 1.0),
        ("relaxed_accuracy", "7%", ["0.07"], 1.0),
        ("relaxed_accuracy", "0.01", ["0"], 0.0),
        ("relaxed_accuracy", "0", ["0"], 1.0),
        ("relaxed_accuracy", "nan", ["100"], 0.0),
        ("relaxed_accuracy", "Brazil", ["brazil"], 1.0),
        ("exact", "Red.", ["red"], 1.0),
        ("exact", "reddish", ["red"], 0.0),
        ("contains", "It says STOP\nhere", ["stop here"], 1.0),
        ("contains", "It says", ["stop"], 0.0),
        ("contains_formula", "so x ^ 2 = y", ["x^2=y"], 1.0),
        ("contains_formula", "X^2=y", ["x^2=y"], 0.0),
    ],
)
def test_short_answers(rule, answer, golds, points):
    assert getattr(short_answers, rule)(answer, golds) == pytest.approx(points)


@pytest.mark.parametrize(
    ("answer", "golds", "points"),
    [
        ("15", ["5"], 0.0),
        ("I say 0.25", ["5"], 0.0),
        ("1,000", ["1000"], 1.0),
        ("0.334", ["1/3", "0.33"], 1.0),  # two digits
        ("3.43", ["24/7", "3.429"], 1.0),
        ("x = 4\ny = 24/7", ["24/7"], 1.0),
        ("6 = x\ny = 24/7", ["6"], 0.0),  # what is behind the last line's "=" counts
        ("So it is 6e3", ["6000"], 1.0),
        ("The answer is: the Boston Tea Party.", ["boston tea party"], 1.0),
        ("The tea is cold, so it could be Boston", ["tea"], 0.0),
        ("Boston", ["b"], 0.0),
        ("vitamin B or C", ["b"], 1.0),
        ("", ["b"], 0.0),
    ],
)
def test_open_answers(answer, golds, points):
    assert open_answer(answer, golds) == points


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "ab") == edit_distance("ab", "") == 2
    assert anls("", [""]) == 1.0


# --------------------------------------------------------------------------------- through the tables


def png(shade: int = 0) -> str:
    file = io.BytesIO()
    Image.effect_noise((20, 20), 10.0 + shade).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


CHOICE = {"question": "What is it?", "A": "cat", "B": "dog", "answer": "B", "category": "animals"}
PLAIN = {"question": "What is it?"}
VISTA = {**PLAIN, "task": "figure", "choices": "", "answer_option": "", "precision": ""}
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
        scored = score_answers(dataset, {"1": Answered(answer)}, "full")
        assert [item.score for item in scored.items] == [pytest.approx(points)], answer
    (item,) = score_answers(dataset, {}, "full").items
    assert (item.score, item.error) == (0, "there is no answer to it")


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
def test_mathvista(change, answer, points, tmp_path):
    row = {**CASES["MathVista_MINI"][0], **change}
    file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(), **row}])
    dataset = read_dataset("MathVista_MINI", str(file))
    assert score_answers(dataset, {"1": Answered(answer)}, "full").items[0].score == points


MULTI = {**VISTA, "question_type": "multi_choice", "answer_type": "text", "answer": "x"}
FREE = {**VISTA, "question_type": "free_form", "answer_type": "integer", "answer": "3"}


@pytest.mark.parametrize(
    ("name", "right", "change", "error"),
    [
        ("MathVista_MINI", FREE, {**MULTI, "choices": "oops"}, "`choices` is no list of options: 'oops'"),
        ("MathVista_MINI", FREE, {**MULTI, "choices": "'xyz'"}, "`choices` is no list of options"),
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
def test_a_gold_answer_that_nothing_can_match_is_an_error(name, right, change, error, tmp_path):
    rows = [{"index": n, "image": png(n), **right, **given} for n, given in enumerate([{}, change])]
    dataset = read_dataset(name, str(table(tmp_path / "table.tsv", rows)))
    said = {str(n): Answered(str(change.get("answer", "A"))) for n in range(2)}
    good, bad = score_answers(dataset, said, "full").items
    assert good.error is None
    assert bad.score == 0
    assert error in bad.error
    with pytest.raises(DataError, match="none of 1 rows can be scored"):
        read_dataset(name, str(table(tmp_path / "table.tsv", rows[1:])))


def test_an_answer_that_names_no_choice_is_not_a_gold_answer_that_names_none():
    assert mathvista({**MULTI, "choices": "['y', 'z']"}, "neither of them", None) == 0


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [("MMStar", {**CHOICE, "answer": "b "}, "B"), ("POPE", {**PLAIN, "answer": "YES"}, "yes")],
)
def test_the_case_of_a_gold_answer_does_not_count(name, row, answer, tmp_path):
    file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(), "category": "", **row}])
    assert score_answers(read_dataset(name, str(file)), {"1": Answered(answer)}, "full").items[0].score == 1


def test_a_circular_question_is_right_if_all_its_rotations_are(tmp_path):
    rows = [
        {"index": 7, "image": png(), **CHOICE},
        {"index": 8, "image": 7, **CHOICE, "question": "And what is this?"},
        {"index": 9, "image": png(1), **CHOICE},
        {"index": 1000007, "image": 7, **CHOICE, "A": "dog", "B": "cat", "answer": "A"},
        {"index": 1000008, "image": 7, **CHOICE, "A": "dog", "B": "cat", "answer": "A"},
    ]
    dataset = read_dataset("MMBench_DEV_EN", str(table(tmp_path / "table.tsv", rows)))
    said = {"7": "B", "8": "B", "1000007": "A", "1000008": "B"}
    items = score_answers(dataset, {k: Answered(v) for k, v in said.items()}, "full").items
    assert [(item.index, item.score, item.prediction) for item in items] == [
        ("7", 1.0, "B | A"),
        ("8", 0.0, "B | B"),
        ("9", 0.0, ""),
    ]
    first, second, third = (item.group for item in items)
    assert first == second != third  # questions about one image are one group
    assert len(read_dataset("MMBench_DEV_EN", dataset.file, limit=1).questions) == 2


def test_what_mme_publishes(tmp_path):
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
    answers = {k: Answered(v) for k, v in said.items()}
    assert score_answers(dataset, answers, "full").totals == {}  # sums over five rows of 2,374 say nothing
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


def test_what_pope_publishes(tmp_path):
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
    scored = score_answers(dataset, {k: Answered(v) for k, v in said.items()}, "full")
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


def test_mmmu_counts_its_validation_questions_and_takes_open_ones(tmp_path):
    rows = [
        {"index": "a", "image": png(), **CHOICE, "split": "dev"},
        {"index": "b", "image": png(1), **CHOICE, "split": "validation", "A": "", "B": "", "answer": "12 m"},
    ]
    dataset = read_dataset("MMMU_DEV_VAL", str(table(tmp_path / "table.tsv", rows)))
    assert [question.index for question in dataset.questions] == ["b"]
    assert score_answers(dataset, {"b": Answered("It is 12 m long")}, "full").items[0].score == 1


@pytest.mark.parametrize(
    ("name", "row", "asked"),
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
def test_the_instruction_behind_a_question(name, row, asked, tmp_path):
    file = str(table(tmp_path / "table.tsv", [{"index": 1, "image": png(), **row}]))
    (question,) = read_dataset(name, file).questions
    assert question.messages[0].text == f"<image>{asked}"
    (question,) = read_dataset(name, file, instruction="Be {brief}.").questions
    assert question.messages[0].text.endswith("\nBe {brief}.")
    assert "Answer" not in question.messages[0].text
