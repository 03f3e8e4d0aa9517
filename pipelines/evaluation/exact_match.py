"""Exact match: compare a model's greedy answer to the last question of each row with the expected answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import ProcessorMixin

from pipelines.data.chat import ChatFormat, encode
from pipelines.data.collate import OnUnreadable, open_images
from pipelines.data.rows import TrainingRow
from pipelines.data.special_tokens import without_joiners
from pipelines.evaluation.fingerprints import of_one
from pipelines.evaluation.items import OVERALL, Item

TEST = "test"
"""The dataset of the items of training rows."""

_SPARE_TOKENS = 8
"""An answer that is this much longer than the longest expected one of its batch is cut off: it is wrong."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one row, and the logarithm of its probability as in `Item`."""

    key: str
    task: str
    expected: str
    answer: str
    log_probability: float | None = field(default=None, compare=False)

    @property
    def correct(self) -> bool:
        """Whether the answer equals the expected one, up to case and white space."""
        return normalised(self.answer) == normalised(self.expected)


def normalised(text: str) -> str:
    """Collapse white space, fold case, and drop the character that escapes special tokens."""
    return " ".join(without_joiners(text).split()).casefold()


def accuracy_by_task(answers: Iterable[Answer]) -> dict[str, float]:
    """Return the share of correct answers per task, then over all rows as `OVERALL`.

    Rows without a task count only in `OVERALL`.
    """
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


def exact_items(rows: Sequence[TrainingRow], answers: Sequence[Answer], system: str) -> list[Item]:
    """Return an item for each row with its answer. Rows with the same first image form a group."""
    return [
        Item(
            *(TEST, row.key, system, row.task, group_of(row), answer.answer, float(answer.correct)),
            log_probability=answer.log_probability,
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def group_of(row: TrainingRow) -> str:
    """Return what rows with the same first image have in common; the key of a row without images."""
    return of_one(row.images[0]) if row.images else row.key


def evaluate_exact_match(
    model: Any,
    processor: ProcessorMixin,
    rows: Sequence[TrainingRow],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    on_unreadable: OnUnreadable | None = None,
) -> list[Answer]:
    """Answer the last question of every row, given its earlier turns; return the answers in row order.

    Rows with an image that cannot be opened go to ``on_unreadable`` and get no answer; without it such an
    image raises `DataError`.

    Decoding is greedy and runs on the model's device. The model's state is kept: Skip-Vision applies if it is
    attached, and mixed precision inside ``torch.autocast``. Rows with expected answers of similar length
    share a batch, and a batch ends when none of its unfinished answers can still be right.
    """
    chat = ChatFormat(processor)
    expected = [row.messages[-1].text for row in rows]
    prompts = [chat.prompt(row.messages[:-1]) for row in rows]
    learnt = [chat.special.escape([text])[0] for text in expected]
    lengths = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in learnt]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], len(prompts[i])))
    answers: dict[int, Answer] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            readable, images = open_images([rows[i] for i in batch], on_unreadable)
            keys = {row.key for row in readable}
            batch = [i for i in batch if rows[i].key in keys]
            if not batch:
                continue
            inputs = encode(processor, [prompts[i] for i in batch], images, padding_side="left")
            limit = min(max_new_tokens, max(lengths[i] for i in batch) + _SPARE_TOKENS)
            for i, text in zip(batch, greedy_texts(model, chat.tokenizer, inputs, limit), strict=True):
                answers[i] = Answer(
                    rows[i].key, rows[i].task, expected[i], chat.special.unescape(text).strip()
                )
    return [answers[i] for i in sorted(answers)]


def greedy_texts(model: Any, tokenizer: Any, inputs: Mapping[str, torch.Tensor], limit: int) -> list[str]:
    """Return the greedy answers to prompts that are padded on the left, of up to ``limit`` tokens."""
    device = model.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    generated = model.generate(
        **inputs,
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        # Without these, a checkpoint's sampling settings cause warnings.
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(
        generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return all tokens that end an answer: the model's, and the tokenizer's, which training may have set."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return sorted({*ids, tokenizer.eos_token_id})


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restore the mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
