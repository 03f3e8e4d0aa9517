"""The prompt of each row: a template with columns, or the row's own conversation."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from pipelines.data.conversations import check_placeholders, parse_messages
from pipelines.data.rows import IMAGE_PLACEHOLDER, BadRow, Message


class PromptTemplate:
    """A text with ``{column}`` for a row's value and ``{{`` for a brace."""

    def __init__(self, text: str) -> None:
        """Parse the text. Raise `ValueError` if braces contain anything but a column's name."""
        self._pieces: list[tuple[str, str | None]] = []
        for literal, column, specification, conversion in string.Formatter().parse(text):
            self._pieces.append((literal, column))
            if column is not None and (not column.isidentifier() or specification or conversion):
                raise ValueError(
                    f"{{{column}…}} is not the name of a column; write a literal brace twice: {{{{ or }}}}"
                )
        self.columns = tuple(dict.fromkeys(column for _, column in self._pieces if column is not None))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Return the text for one row. Raise `BadRow` if a value is missing or is neither text nor number."""
        pieces = []
        for literal, column in self._pieces:
            pieces.append(literal)
            if column is not None:
                value = row.get(column)
                if not isinstance(value, str | int | float):
                    found = "has no value" if value is None else f"is of type {type(value).__name__}"
                    raise BadRow("broken record", f"column `{column}` of the prompt {found}, expected text")
                pieces.append(str(value).strip())
        return "".join(pieces)


def prompt_messages(
    row: Mapping[str, Any], images: int, template: PromptTemplate | None, system: str | None
) -> tuple[Message, ...]:
    """Return the messages to answer: the filled template or, without one, the row's own conversation.

    Raises:
        BadRow: the row has no value for a column, no user message, or a wrong number of images.
    """
    if template is None:
        messages = parse_messages(row)
        last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        if last < 0:
            raise BadRow("conversation", "the conversation has no user message to answer")
        messages = messages[: last + 1]
    else:
        text = template.fill(row)
        if IMAGE_PLACEHOLDER not in text:
            text = IMAGE_PLACEHOLDER * images + text
        messages = (Message("user", text),)
    if system is not None and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    check_placeholders(messages, images)
    return messages
