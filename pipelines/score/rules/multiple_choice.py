"""Which option of a multiple-choice question an answer means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_SPELT_OUT = re.compile(r"(?i:answer is)\W*([A-Z])\b(?!\s+\w)")


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means; None if that cannot be told.

    In this order: the only letter of an option that stands alone among the last four words; the letter behind
    "answer is", if it is a capital and no word follows it (as one follows an article); the only option whose
    text occurs in the answer, if the answer is not more than twice as long as all options together.

    Source: MMBench (arXiv 2307.06281), "ChatGPT-involved choice extraction", its first step, as VLMEvalKit
    takes it before a judge is asked (github.com/open-compass/VLMEvalKit, vlmeval/utils/matching_util.py).
    "answer is" is this project's own.
    """
    words = answer.translate(_AROUND_LETTERS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if (spelt := _SPELT_OUT.search(answer)) and spelt[1] in options:
        return spelt[1]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    said = answer.lower()
    named = [letter for letter, text in options.items() if text.lower() in said]
    return named[0] if len(named) == 1 else None


def all_rotations_right(right: Sequence[bool]) -> float:
    """Points of a question that was asked once for each rotation of its options: all or nothing.

    Source: MMBench (arXiv 2307.06281), "The circular evaluation strategy".
    """
    return float(all(right))
