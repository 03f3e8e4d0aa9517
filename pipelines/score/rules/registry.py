"""The rules by name: how an answer to a row gets its points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.data.instructions import OPTION_QUESTION, SHORT_QUESTION, WHOLE_QUESTION, YES_OR_NO_QUESTION
from pipelines.data.literals import literal
from pipelines.data.tsv_records import options
from pipelines.evaluation.exact_match import normalised
from pipelines.score.rules import mathvista, short_answer
from pipelines.score.rules.judge import Judge
from pipelines.score.rules.multiple_choice import chosen_option
from pipelines.score.rules.open_ended import open_answer
from skipvision.errors import ConfigError

Row = Mapping[str, str]

_FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The category of OCRBench whose answers are formulas."""


@dataclass(frozen=True)
class Rule:
    """A published way to give an answer its points.

    Attributes:
        points: maps a row, an answer and the judge (or None) to points, 0 … 1.
        columns: the columns that a row must have besides ``index`` and ``question``.
        needs_judge: whether the rule fails without a judge.
        prompt_column: the column that becomes the prompt, where a dataset has no instruction of its own.
        problem: maps a row to the reason why no answer to it can be right; None if one can.
    """

    points: Callable[[Row, str, Judge | None], float]
    columns: tuple[str, ...] = ("answer",)
    needs_judge: bool = False
    prompt_column: str = SHORT_QUESTION
    problem: Callable[[Row], str | None] = lambda row: None


def golds(row: Row) -> list[str]:
    """Return the gold answers of a row. VLMEvalKit stores several as a Python list."""
    text = row["answer"]
    try:
        listed = literal(text)
    except ValueError:
        return [text]
    return [str(value) for value in listed] if isinstance(listed, list) and listed else [text]


def gold_word(row: Row) -> str:
    """Return the gold answer of a yes-or-no question as ``Yes`` or ``No``."""
    return row["answer"].strip().capitalize()


def _option(row: Row, answer: str, judge: Judge | None) -> float:
    choices = options(row)
    if not choices:
        return open_answer(answer, golds(row))
    letter = chosen_option(answer, choices)
    if letter is None and judge is not None:
        letter = judge.choose(row["question"], choices, answer)
    return float(letter == _gold_letter(row))


def _gold_letter(row: Row) -> str:
    return row["answer"].strip().upper()


def _option_problem(row: Row) -> str | None:
    choices = options(row)
    if not choices or _gold_letter(row) in choices:
        return None
    return f"the gold answer {row['answer']!r} is not the letter of an option: {', '.join(choices)}"


def _yes_or_no(row: Row, answer: str, judge: Judge | None) -> float:
    return float(short_answer.yes_or_no(answer) == gold_word(row))


def _yes_or_no_at_first(row: Row, answer: str, judge: Judge | None) -> float:
    return float(short_answer.yes_or_no_at_first(answer) == gold_word(row))


def _yes_or_no_problem(row: Row) -> str | None:
    if gold_word(row) in ("Yes", "No"):
        return None
    return f"the gold answer {row['answer']!r} is neither yes nor no"


def _contains(row: Row, answer: str, judge: Judge | None) -> float:
    if row.get("category") == _FORMULAS:
        return short_answer.contains_formula(answer, golds(row))
    return short_answer.contains(answer, golds(row))


def _judged(row: Row, answer: str, judge: Judge | None) -> float:
    if judge is None:
        raise ConfigError("the rule `judged` needs a judge: set judge.model and judge.base_url")
    return judge.grade(row["question"], row["answer"], answer)


def _of_golds(points: Callable[[str, Sequence[str]], float]) -> Callable[[Row, str, Judge | None], float]:
    return lambda row, answer, judge: points(answer, golds(row))


def _same_text(answer: str, right: Sequence[str]) -> float:
    return float(normalised(answer) in map(normalised, right))


RULES = {
    "option": Rule(_option, prompt_column=OPTION_QUESTION, problem=_option_problem),
    "yes_or_no": Rule(_yes_or_no, prompt_column=YES_OR_NO_QUESTION, problem=_yes_or_no_problem),
    "yes_or_no_at_first": Rule(
        _yes_or_no_at_first, prompt_column=YES_OR_NO_QUESTION, problem=_yes_or_no_problem
    ),
    "vqa": Rule(_of_golds(short_answer.vqa_accuracy)),
    "anls": Rule(_of_golds(short_answer.anls)),
    "relaxed": Rule(_of_golds(short_answer.relaxed_accuracy)),
    "exact": Rule(_of_golds(short_answer.exact)),
    "contains": Rule(_contains, prompt_column=WHOLE_QUESTION),
    "mathvista": Rule(
        mathvista.mathvista, mathvista.COLUMNS, prompt_column=WHOLE_QUESTION, problem=mathvista.problem
    ),
    "judged": Rule(_judged, needs_judge=True, prompt_column=WHOLE_QUESTION),
    "same_text": Rule(_of_golds(_same_text), prompt_column=WHOLE_QUESTION),
}
"""The names are those of the setting ``datasets.rule``."""
