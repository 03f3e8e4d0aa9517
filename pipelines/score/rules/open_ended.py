"""Points for open questions, which have neither options nor one form of answer.

Source: MMMU (arXiv 2311.16502), "Evaluation", and the evaluation code beside it
(github.com/MMMU-Benchmark/MMMU, eval_utils.py: parse_open_response and eval_open).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NOTHING = frozenset({"", ":", ",", ".", "!", "?", ";", "'"})
_NUMBER = re.compile(
    r"-?(?:\b\d{1,3}(?:,\d{3})+\b"  # 1,000
    r"|\d+(?:\.\d+)?e[+-]?\d+"
    r"|(?:\d*\.\d+|\d+\b)(?![,\d]))"
)


def open_answer(answer: str, golds: Sequence[str]) -> float:
    """1 if what an answer comes to has a gold answer in it.

    What it comes to is, in each line, the shortest text behind words such as "is" or "therefore" (in the last
    line also behind "="), or, where there are none, the answer itself; and the numbers therein. Numbers are
    compared as numbers, rounded to two digits; a gold text must occur in a text.
    """
    right = [form for gold in golds for form in _forms(gold)]
    said = [form for text in _said(answer) for form in _forms(text)]
    return float(any(_agree(form, gold) for form in said for gold in right))


def _agree(said: float | str, gold: float | str) -> bool:
    return gold in said if isinstance(said, str) and isinstance(gold, str) else said == gold


def _said(answer: str) -> Iterator[str]:
    """The texts that an answer comes to, and the numbers in them."""
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    texts = []
    for number, line in enumerate(lines, start=1):
        leads = (*_LEADS, "=") if number == len(lines) else _LEADS
        behind = [line.rpartition(lead)[2].strip() for lead in leads if lead in line]
        if behind and (shortest := min(behind, key=len)) not in _NOTHING:
            texts.append(shortest)
    for text in texts or [whole]:
        yield text
        yield from _NUMBER.findall(text)


def _forms(text: str) -> list[float | str]:
    """A text as it is compared; a single letter must be a word of its own, at least on one side."""
    text = text.strip().lower()
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return [round(value, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
