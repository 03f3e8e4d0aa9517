"""Rows become inputs: the labels are exactly the answers, and batches repeat after a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from pipelines.data.chat import ChatFormat
from pipelines.data.collate import IGNORED, Collator
from pipelines.data.rows import Message, TrainingRow
from pipelines.finetune.batches import LengthGroupedBatches, prefetched, row_lengths
from skipvision import SkipConfig
from skipvision.errors import ConfigError

CHATML = (
    "{% for m in messages %}<start>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
# LLaVA-1.5's template: it marks the answers but does not end them.
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
FORGETFUL = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"


@dataclass(frozen=True)
class Plain:
    """An image of one colour."""

    colour: str = "red"

    def open(self) -> Image.Image:
        return Image.new("RGB", (80, 60), self.colour)


def row(images: int, *turns: str) -> TrainingRow:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return TrainingRow("key", tuple(Plain() for _ in range(images)), messages)


TEXT_ONLY = row(0, "What is written?", "nothing at all")
MULTI_TURN = row(1, "<image>\nWhat colour?", "red", "How many?", "3 of them, I think", "Where?", "left")
MULTI_IMAGE = row(2, "Compare <image> with <image> please", "no difference")
ROWS = [TEXT_ONLY, MULTI_TURN, MULTI_IMAGE]


@pytest.fixture
def processor(tiny_model: Path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(tiny_model)


def with_template(processor: ProcessorMixin, template: str) -> ProcessorMixin:
    processor.chat_template = template
    processor.tokenizer.add_tokens(["<start>", "<end>"], special_tokens=True)
    return processor


def learnt(processor: ProcessorMixin, rows: list[TrainingRow], end: str) -> list[list[str]]:
    """Return the answers in the labels of a batch, row by row, without their end tokens."""
    batch = Collator(processor)(rows)
    answers = []
    for labels, ids in zip(batch.labels, batch.inputs["input_ids"], strict=True):
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
        pieces = processor.tokenizer.decode(labels[labels != IGNORED]).split(end)
        assert pieces.pop() == ""
        answers.append([piece.strip() for piece in pieces])
    return answers


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "</s>"), (CHATML, "<end>"), (WITHOUT_END, "</s>")],
    ids=["marked answers", "no marks", "marked answers without an end"],
)
def test_the_labels_are_exactly_the_answers_and_their_ends(processor, template, end):
    if template is not None:
        with_template(processor, template)
    assert learnt(processor, ROWS, end) == [
        ["nothing at all"],
        ["red", "3 of them, I think", "left"],
        ["no difference"],
    ]


def test_a_row_is_the_same_alone_and_in_a_batch(processor):
    together = Collator(processor)(ROWS)
    for i, alone in enumerate(Collator(processor)([one]) for one in ROWS):
        length = alone.labels.shape[1]
        assert torch.equal(together.labels[i, :length], alone.labels[0])
        assert torch.equal(together.inputs["input_ids"][i, :length], alone.inputs["input_ids"][0])
        assert (together.labels[i, length:] == IGNORED).all()
        assert (together.inputs["attention_mask"][i, length:] == 0).all()
    assert together.images == 3
    assert together.inputs["pixel_values"].shape[0] == 3


def test_a_text_only_batch_has_no_pixels(processor):
    batch = Collator(processor)([TEXT_ONLY])
    assert "pixel_values" not in batch.inputs
    assert (batch.images, batch.rows) == (0, 1)


def test_the_prompt_is_the_text_before_the_answer(processor):
    chat = ChatFormat(processor)
    rendered = chat.render(MULTI_TURN.messages)
    start, end = rendered.answers[-1]
    assert rendered.text[:start] == chat.prompt(MULTI_TURN.messages[:-1])
    assert rendered.text[start:end] == " left</s>"


def test_a_template_that_forgets_turns_is_refused(processor):
    with_template(processor, FORGETFUL)
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        Collator(processor)([row(0, "a", "b", "c", "d")])


def test_no_template_is_refused(processor):
    processor.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormat(processor)


@pytest.mark.parametrize("pixels", [False, True])
def test_lengths_are_those_of_the_batch(processor, pixels, monkeypatch):
    if pixels:  # the number of visual tokens is unknown without them
        monkeypatch.delattr(type(processor), "_get_num_multimodal_tokens")
    tokens = Collator(processor)(ROWS).inputs["attention_mask"].sum(dim=1).tolist()
    assert row_lengths(processor, ROWS) == [(length, length) for length in tokens]


def test_computed_lengths_are_those_of_the_reduced_rows(processor):
    ids = Collator(processor)(ROWS).inputs["input_ids"]
    visual = (ids == processor.image_token_id).sum(dim=1).tolist()
    kept = 2 + 3 + 2  # with a summary token for each group
    lengths = row_lengths(processor, ROWS, SkipConfig(retained=2, skipped=3))
    removed = [length.tokens - length.computed for length in lengths]
    assert removed == [tokens - len(one.images) * kept for tokens, one in zip(visual, ROWS, strict=True)]
    assert removed[0] == 0 < removed[1] < removed[2]


# ------------------------------------------------------------------------------------------- batches


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    batch_size=st.integers(1, 20),
    workers=st.integers(1, 4),
    micro=st.one_of(st.none(), st.integers(1, 5)),
    seed=st.integers(0, 3),
)
def test_every_epoch_shows_every_row_once_to_one_worker(lengths, batch_size, workers, micro, seed):
    batches = LengthGroupedBatches(lengths, batch_size, seed)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            parts = [batches.share(step, rank, workers, micro) for rank in range(workers)]
            rows = [row for part in parts for group in part for row in group]
            assert sorted(rows) == sorted(batches.batch(step))
            assert all(0 < len(group) <= (micro or batch_size) for part in parts for group in part)
            seen += rows
        assert sorted(seen) == list(range(len(lengths)))


def test_a_step_has_the_same_rows_whatever_came_before():
    lengths = [(37 * i) % 101 for i in range(500)]
    straight = LengthGroupedBatches(lengths, 8, seed=3)
    order = [straight.batch(step) for step in range(150)]
    resumed = LengthGroupedBatches(lengths, 8, seed=3)
    assert [resumed.batch(step) for step in (149, 0, 70, 3)] == [order[step] for step in (149, 0, 70, 3)]
    assert [LengthGroupedBatches(lengths, 8, seed=4).batch(step) for step in range(150)] != order
    assert sorted(order[:63]) != sorted(order[63:126])  # epochs differ


def test_batches_group_rows_by_length_and_start_with_the_longest():
    lengths = [(7919 * i) % 1000 + 1 for i in range(2048)]
    batches = LengthGroupedBatches(lengths, 16, seed=0)
    padded = sum(16 * max(lengths[i] for i in batches.batch(step)) for step in range(batches.per_epoch))
    assert padded < 1.03 * sum(lengths)
    assert max(lengths) == lengths[batches.batch(0)[0]]


def test_prefetching_keeps_the_order_and_the_position_of_errors():
    def make(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item * 10

    made = prefetched(make, range(5), ahead=2)
    assert [next(made), next(made), next(made)] == [0, 10, 20]
    with pytest.raises(ValueError, match="three"):
        next(made)


def test_measuring_many_rows_prints_progress(processor, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.finetune.batches._PROGRESS_SECONDS", -1.0)
    row_lengths(processor, [ROWS[0]] * 2049)
    assert capsys.readouterr().out.splitlines() == [
        f"{done} of 2049 rows measured" for done in (0, 1024, 2048)
    ]
