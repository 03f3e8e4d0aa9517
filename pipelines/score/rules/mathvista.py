"""MathVista: extract the final answer, convert it to the type of the row, and compare it.

Source: MathVista (arXiv 2310.02255), "Evaluation protocols", and its evaluation code
(github.com/lupantech/MathVista, evaluation/extract_answer.py and calculate_score.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rapidfuzz.distance import Levenshtein

from pipelines.data.literals import literal
from pipelines.score.rules.judge import Judge
from pipelines.score.rules.multiple_choice import chosen_option
from skipvision.errors import DataError

COLUMNS = ("question_type", "answer_type", "answer")
"""The columns that a row must have besides its question."""

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def mathvista(row: Mapping[str, str], answer: str, judge: Judge | None) -> float:
    """Return 1 if the extracted answer equals the gold answer, else 0.

    The judge extracts the final answer from longer ones. Without a judge, the last number in the answer
    counts, or the option that the answer names.
    """
    if not answer.strip():  # there is nothing to extract
        return 0.0
    if row["question_type"] == "multi_choice":
        letter = _option(row, answer, judge)
        return float(letter is not None and letter == _gold_option(row))
    gold, value = _value(row, row["answer"]), _value(row, answer)
    if judge is not None and value != gold and (value is None or row["answer_type"] == "text"):
        value = _value(row, judge.extract(row["question"], answer))
    elif value is None:
        value = _value(row, _last_number(answer))
    return float(value is not None and value == gold)


def problem(row: Mapping[str, str]) -> str | None:
    """Return the reason why no answer to a row can be right; None if one can."""
    gold = row["answer"]
    if row["question_type"] == "multi_choice":
        try:
            known = _gold_option(row) in _choices(row)
        except DataError as error:
            return str(error)
        return None if known else f"the gold answer {gold!r} is none of the choices {row['choices']}"
    return f"the gold answer {gold!r} is no {row['answer_type']}" if _value(row, gold) is None else None


def _option(row: Mapping[str, str], answer: str, judge: Judge | None) -> str | None:
    choices = _choices(row)
    letter = chosen_option(answer, choices)
    if letter is None and judge is not None:
        extracted = judge.extract(row["question"], answer)
        # The published rule falls back to the option that is most similar to the extracted text.
        letter = chosen_option(extracted, choices) or min(
            choices, key=lambda letter: Levenshtein.distance(extracted.lower(), choices[letter].lower())
        )
    return letter


def _gold_option(row: Mapping[str, str]) -> str | None:
    if row.get("answer_option"):
        return row["answer_option"].strip().upper()
    return next((letter for letter, text in _choices(row).items() if text == row["answer"]), None)


def _choices(row: Mapping[str, str]) -> dict[str, str]:
    try:
        listed = literal(row.get("choices", ""))
        if not isinstance(listed, list | tuple):
            raise ValueError
    except ValueError:
        raise DataError(f"column `choices` is not a list of options: {row.get('choices')!r}") from None
    return {chr(ord("A") + number): str(text) for number, text in enumerate(listed)}


def _value(row: Mapping[str, str], text: str) -> object:
    """Convert a text to the answer type of the row; return None if it has another type."""
    try:
        match row["answer_type"]:
            case "integer":
                return int(float(text.replace(",", "")))
            case "float":
                return round(float(text.replace(",", "")), int(float(row.get("precision") or 2)))
            case "list":
                return literal(text)
    except (ValueError, OverflowError):
        return None
    return text.strip().lower()


def _last_number(text: str) -> str:
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else text
