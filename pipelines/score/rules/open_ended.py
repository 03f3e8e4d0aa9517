"""Open questions: neither options nor a fixed form of the answer.

Source: MMMU (arXiv 2311.16502), "Evaluation", and its evaluation code
(github.com/MMMU-Benchmark/MMMU, eval_utils.py: parse_open_response and eval_open).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_EMPTY = frozenset({"", ":", ",", ".", "!", "?", ";", "'"})
_NUMBER = re.compile(
    r"-?(?:\b\d{1,3}(?:,\d{3})+\b"  # 1,000
    r"|\d+(?:\.\d+)?e[+-]?\d+"
    r"|(?:\d*\.\d+|\d+\b)(?![,\d]))"
)


def open_answer(answer: str, golds: Sequence[str]) -> float:
    """Return 1 if a conclusion of the answer contains a gold answer, else 0.

    The conclusion of a line is the shortest text after a word such as "is" or "therefore"; in the last line,
    also after "=". If no line has a conclusion, the whole answer is one. The numbers in a conclusion are
    conclusions too. Numbers are compared as numbers, rounded to two digits; a gold text must occur in the
    conclusion.
    """
    right = [form for gold in golds for form in _forms(gold)]
    concluded = [form for text in _conclusions(answer) for form in _forms(text)]
    return float(any(_agree(form, gold) for form in concluded for gold in right))


def _agree(form: float | str, gold: float | str) -> bool:
    return gold in form if isinstance(form, str) and isinstance(gold, str) else form == gold


def _conclusions(answer: str) -> Iterator[str]:
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    texts = []
    for number, line in enumerate(lines, start=1):
        leads = (*_LEADS, "=") if number == len(lines) else _LEADS
        candidates = [line.rpartition(lead)[2].strip() for lead in leads if lead in line]
        if candidates and (shortest := min(candidates, key=len)) not in _EMPTY:
            texts.append(shortest)
    for text in texts or [whole]:
        yield text
        yield from _NUMBER.findall(text)


def _forms(text: str) -> list[float | str]:
    """Return a text in the forms that are compared; a single letter must stand apart on one side at least."""
    text = text.strip().lower()
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return [round(value, 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
