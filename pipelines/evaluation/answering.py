"""Answers of an engine to training rows: what the endpoint would return to the last question of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pipelines.data.chat import chat_messages
from pipelines.data.images import ImageError
from pipelines.data.rows import ImageSource, Message, TrainingRow
from pipelines.data.special_tokens import special_tokens_of
from pipelines.evaluation.exact_match import Answer
from skipvision.config import SkipConfig
from skipvision.engine import Completion, Engine, Request, Sampling, prepare


def answer_rows(
    engine: Engine,
    rows: Sequence[TrainingRow],
    *,
    skip: SkipConfig | Literal["full"] | None = None,
    max_new_tokens: int = 128,
    processor: Any = None,
) -> list[Answer]:
    """Answer each row's last question greedily, with its earlier turns as context, in the order of rows.

    The answers have their log probabilities.

    Args:
        engine: runs the requests under its default adapter.
        rows: each ends in the expected answer.
        skip: SkipConfig of all requests; "full" skips nothing, None uses the adapter's or the engine's own.
        max_new_tokens: max length of an answer.
        processor: prepares the requests; None = the engine's own.

    Raises:
        ImageError: an image cannot be opened.
        SkipVisionError: the engine refuses a request, or cannot complete it.
    """
    found: dict[int, tuple[str, float | None]] = {}
    failures: list[Exception] = []
    special = special_tokens_of(engine.processor)
    sampling = Sampling(max_new_tokens=max_new_tokens, logprobs=0)

    def requests() -> Iterator[Request]:
        for index, row in enumerate(rows):
            if failures:
                return  # the engine finishes what it has, and is idle for its next user
            try:
                request = request_for(row.messages[:-1], row.images, engine.processor, sampling)
            except ImageError as error:
                failures.append(error)
                return
            prepared = request if processor is None else prepare(processor, request)
            yield replace(prepared, skip=skip, key=index)

    for completion in engine.run(requests()):
        if completion.error is not None:
            failures.append(completion.error)
        else:
            text = special.unescape(completion.text).strip()
            found[completion.key] = text, log_probability(completion)
    if failures:
        raise failures[0]
    return [Answer(row.key, row.task, row.messages[-1].text, *found[index]) for index, row in enumerate(rows)]


def log_probability(completion: Completion) -> float | None:
    """Return the sum of the log probabilities of the first answer's tokens; None if they were not requested.

    The token that ends the answer counts, so the sum is that of this answer and no longer one.
    """
    tokens = completion.choices[0].logprobs if completion.choices else None
    return None if tokens is None else sum(token.logprob for token in tokens)


def request_for(
    messages: Sequence[Message], images: Iterable[ImageSource], processor: Any, sampling: Sampling
) -> Request:
    """Return an engine's request for a chat. Raise `ImageError` if an image cannot be opened."""
    chat = chat_messages(messages, processor)
    return Request(chat, [image.open() for image in images], sampling=sampling)


def seconds_of(engine: Engine, request: Request) -> float:
    """Return the seconds in which an idle engine completes a prepared request. Raise the request's error."""
    started = time.perf_counter()
    [completion] = engine.run([request])
    taken = time.perf_counter() - started
    if completion.error is not None:
        raise completion.error
    return taken
