"""Find the turns of a row's conversation in the formats of several trainers.

::

    "conversations": [{"from", "value"}, …]                            LLaVA, ShareGPT
    "messages": [{"role", "content"}, …]                               OpenAI, TRL
    "prompt": text or messages, "completion": text or messages         TRL
    "query", "response", with "history": [[query, response], …]        ms-swift
    "instruction", "output", with "input" and the same "history"       Alpaca

The last three may have a text ``system``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipelines.data.rows import BadRow

CONVERSATION_COLUMNS = (
    *("conversations", "messages", "prompt", "completion", "query", "response", "instruction", "input"),
    *("output", "history", "system"),
)
"""Columns that may hold a conversation."""
_PAIRS = (("prompt", "completion"), ("query", "response"), ("instruction", "output"))
NO_CONVERSATION = (
    "neither `conversations` nor `messages`, nor `prompt` and `completion`, `query` and `response`, or "
    "`instruction` and `output`"
)


class Turns(NamedTuple):
    """The turns, with the field that they are from and the fields of a turn with its speaker and its text."""

    field: str
    value: object
    speaker: str = "role"
    text: str = "content"


def has_conversation(columns: Iterable[str]) -> bool:
    """Return whether a table with these columns may have conversations."""
    names = set(columns)
    return bool(names & {"conversations", "messages"}) or any(set(pair) <= names for pair in _PAIRS)


def turns_of(row: Mapping[str, Any]) -> Turns:
    """Return the turns of a row, unchecked. Raise `BadRow` if it has none."""
    if row.get("conversations") is not None:
        return Turns("conversations", row["conversations"], "from", "value")
    if row.get("messages") is not None:
        return Turns("messages", row["messages"])
    for question, answer in _PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            return Turns(question, _of_pair(row, question, answer))
    if row.get("prompt") is not None and row.get("chosen") is not None:
        raise BadRow(
            "conversation", "the row has preferences (`chosen`), which are not trained on: give `completion`"
        )
    raise BadRow("conversation", f"the row has {NO_CONVERSATION}")


def _of_pair(row: Mapping[str, Any], question: str, answer: str) -> list[object]:
    turns: list[object] = []
    if isinstance(system := row.get("system"), str) and system:
        turns.append({"role": "system", "content": system})
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(h, list) or len(h) != 2 for h in history):
        raise BadRow("broken record", "`history` is not a list of pairs of a question and its answer")
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    asked = row[question]
    if question == "instruction" and isinstance(more := row.get("input"), str) and more:
        asked = f"{asked}\n{more}"
    turns += asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answered = row[answer]
    return turns + (answered if isinstance(answered, list) else [{"role": "assistant", "content": answered}])
