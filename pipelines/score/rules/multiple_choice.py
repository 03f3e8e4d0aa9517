"""Multiple choice: find the option that an answer means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"(?i:answer is)\W*([A-Z])\b(?!\s+\w)")


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer means; None if no rule finds one.

    The rules, in this order:

    1. The only letter of an option in the answer, if it is one of the last four words.
    2. The letter after "answer is", if it is a capital and no word follows. (A word follows an article.)
    3. The only option whose text occurs in the answer, if the answer is at most twice as long as all options
       together.

    Source: MMBench (arXiv 2307.06281), "ChatGPT-involved choice extraction", its first step, as VLMEvalKit
    implements it (github.com/open-compass/VLMEvalKit, vlmeval/utils/matching_util.py). Rule 2 is this
    project's own.
    """
    words = answer.translate(_AROUND_LETTERS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if (match := _ANSWER_IS.search(answer)) and match[1] in options:
        return match[1]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    lower = answer.lower()
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return named[0] if len(named) == 1 else None


def all_rotations_right(right: Sequence[bool]) -> float:
    """Return the points of a question with one answer for each rotation of its options: all or nothing.

    Source: MMBench (arXiv 2307.06281), "The circular evaluation strategy".
    """
    return float(all(right))
