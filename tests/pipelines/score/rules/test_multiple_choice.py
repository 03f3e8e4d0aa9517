"""The option that an answer means."""

from __future__ import annotations

import pytest

from pipelines.score.rules.multiple_choice import chosen_option

OPTIONS = {"A": "cat", "B": "dog", "C": "red bird", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("The best choice is **C**.", "C"),
        ("A dog is in the picture here", "B"),  # this A is an article, too far from the end
        ("The answer is D, as neither a cat nor a dog is to be seen", "D"),
        ("It is a Red Bird", "C"),
        ("A or B", None),
        ("cat or dog", None),
        ("The answer is a dog.", "B"),
        ("The answer is A dog.", "A"),  # as in VLMEvalKit: the only letter among the last four words
        ("The answer is A dog that runs about in the garden", "B"),
        ("So the answer is: (C)! It flies, it is small, and it is red", "C"),
        ("E", None),
        ("I cannot tell", None),
        ("a dog, " + "which I say at great length " * 10, None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_means(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter
