"""How often a model says exactly what was expected: greedy answers to the last question of each row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from pipelines.data.chat import ChatFormat, encode
from pipelines.data.collate import OnUnreadable, open_images
from pipelines.data.rows import TrainingRow
from pipelines.evaluation.items import OVERALL

_SPARE_TOKENS = 8
"""How much longer than the expected answer an answer may get before it is cut off as wrong."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one row."""

    key: str
    task: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Equal but for case and white space."""
        return normalised(self.answer) == normalised(self.expected)


def normalised(text: str) -> str:
    """A text as answers are compared: without case, white space collapsed."""
    return " ".join(text.split()).casefold()


def accuracy_by_task(answers: Iterable[Answer]) -> dict[str, float]:
    """The share of correct answers per task (rows without a task are only in the last), then `OVERALL`."""
    hits: dict[str, list[bool]] = {}
    everything: list[bool] = []
    for answer in answers:
        everything.append(answer.correct)
        if answer.task:
            hits.setdefault(answer.task, []).append(answer.correct)
    hits = {task: hits[task] for task in sorted(hits)}
    if everything:
        hits[OVERALL] = everything
    return {task: sum(right) / len(right) for task, right in hits.items()}


def pick_rows(rows: Sequence[TrainingRow], most: int) -> list[TrainingRow]:
    """At most ``most`` rows, the first ones of every task, the tasks in equal shares as far as they go."""
    seen: dict[str, int] = {}
    ranked = []
    for position, row in enumerate(rows):
        seen[row.task] = seen.get(row.task, 0) + 1
        ranked.append((seen[row.task], position))
    return [rows[position] for _, position in sorted(sorted(ranked)[:most], key=lambda pair: pair[1])]


def evaluate_exact_match(
    model: Any,
    processor: ProcessorMixin,
    rows: Sequence[TrainingRow],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    on_unreadable: OnUnreadable | None = None,
) -> list[Answer]:
    """Ask the model every row's last question, earlier turns given, and return its answers in row order.

    Rows with an image that cannot be opened go to ``on_unreadable`` and are not asked; without it such an
    image is a `DataError`.

    The model answers greedily, on its own device and as it is: with Skip-Vision if that is attached,
    in mixed precision inside ``torch.autocast``. Rows with answers of like length share a batch, and
    a batch ends when no answer in it can be right any more.
    """
    chat = ChatFormat(processor)
    expected = [row.messages[-1].text for row in rows]
    prompts = [chat.prompt(row.messages[:-1]) for row in rows]
    lengths = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], len(prompts[i])))
    answers: dict[int, Answer] = {}
    with _answering(model):
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            readable, images = open_images([rows[i] for i in some], on_unreadable)
            keys = {row.key for row in readable}
            some = [i for i in some if rows[i].key in keys]
            if not some:
                continue
            inputs = encode(processor, [prompts[i] for i in some], images, padding_side="left")
            limit = min(max_new_tokens, max(lengths[i] for i in some) + _SPARE_TOKENS)
            for i, text in zip(some, _generate(model, chat.tokenizer, inputs, limit), strict=True):
                answers[i] = Answer(rows[i].key, rows[i].task, expected[i], text)
    return [answers[i] for i in sorted(answers)]


def _generate(model: Any, tokenizer: Any, inputs: Mapping[str, torch.Tensor], limit: int) -> list[str]:
    device = model.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    produced = model.generate(
        **inputs,
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        # A checkpoint's sampling settings would only be warned about.
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=_end_ids(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(
        produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: those the model knows of, and the one training may have put in."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({*ids, tokenizer.eos_token_id})


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode there was comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
