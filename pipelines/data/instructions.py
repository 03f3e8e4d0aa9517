"""Instructions appended to a question, so that its answer has the form that a scoring rule reads."""

from __future__ import annotations

WHOLE_QUESTION = "whole_question"
"""Column added to every row with a ``question``: hint, question and options as one text."""

OPTION_QUESTION = "option_question"
"""Column: the whole question with the instruction for multiple choice or, without options, a short answer."""

SHORT_QUESTION = "short_question"
"""Column: the whole question with the instruction for a short answer."""

YES_OR_NO_QUESTION = "yes_or_no_question"
"""Column: the whole question with the instruction for yes or no."""

_OPTION = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
# The two above are from LLaVA-1.5 (arXiv 2310.03744, table of response formats), the one below from MME.
_YES_OR_NO = "Please answer yes or no."


def instructed(whole_question: str, has_options: bool) -> dict[str, str]:
    """Return the columns above. An instruction that already ends the question is not repeated."""
    return {
        WHOLE_QUESTION: whole_question,
        OPTION_QUESTION: _with(whole_question, _OPTION if has_options else _SHORT),
        SHORT_QUESTION: _with(whole_question, _SHORT),
        YES_OR_NO_QUESTION: _with(whole_question, _YES_OR_NO),
    }


def _with(question: str, instruction: str) -> str:
    there = question.rstrip().lower().endswith(instruction.lower())
    return question if there else f"{question}\n{instruction}"
