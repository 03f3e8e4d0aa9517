"""Short answers: yes or no, VQA accuracy, ANLS and the other published rules."""

from __future__ import annotations

import pytest

from pipelines.score.rules import short_answer as short_answers
from pipelines.score.rules.short_answer import (
    anls,
    normalised_for_vqa,
    vqa_accuracy,
    yes_or_no,
    yes_or_no_at_first,
)
from tests.pipelines.score.tables import PEOPLE


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
def test_yes_or_no_among_the_first_four_characters(answer, word):
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
        ("a-b;-c", "b c"),  # only a blank of the original text counts, not one that a mark became
        ("a/-b-c", "b c"),
        ("10,000?yes", "10000yes"),
    ],
)
def test_vqa_normalises_answers(answer, normal):
    assert normalised_for_vqa(answer) == normal


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
        ("anls", "abzz", ["abcd"], 0.0),  # half of the characters are wrong
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


def test_anls_counts_insertions_deletions_and_replacements():
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("", ["ab"]) == anls("ab", [""]) == 0.0
    assert anls("", [""]) == 1.0
