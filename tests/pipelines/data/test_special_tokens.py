"""Special tokens inside the texts of rows are text: in training, validation, captioning and scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoProcessor

from pipelines.caption.rows import CaptionRow
from pipelines.caption.stages import prepare_row
from pipelines.data.collate import IGNORED, Collator
from pipelines.data.images import InlineImage
from pipelines.data.prompts import PromptTemplate, prompt_messages
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.special_tokens import JOINER, SpecialTokens, Unescaping, without_joiners
from pipelines.evaluation.answering import request_for
from pipelines.evaluation.exact_match import normalised
from pipelines.finetune.batches import row_lengths
from serve.chat.vocabulary import Vocabulary
from skipvision.engine import Sampling, prepare
from tests.pipelines.data.test_message_parts import png

WORDS = ["</s>", "<pad>", "<start>", "a </s> b", "</s></s>", "<</s>pad>"]
"""Texts with special tokens; ``<start>`` was added to the tokenizer like the marks of ChatML."""
ORDINARY = ["</ s>", "< pad>", "s>", "</", "a < b > c", "<b>bold</b>"]


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    processor = AutoProcessor.from_pretrained(tiny_model)
    processor.tokenizer.add_tokens(["<start>"], special_tokens=True)
    return processor


def image() -> InlineImage:
    return InlineImage(png(), "red")


def control(processor: Any, ids: torch.Tensor) -> list[int]:
    """Return the special tokens of an input, in order."""
    special = {number for number, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    return [token for token in ids.flatten().tolist() if token in special]


def row(question: str, *others: str) -> TrainingRow:
    roles = ("assistant", "user")
    messages = (Message(roles[position % 2], text) for position, text in enumerate(others))
    return TrainingRow("key", (image(),), (Message("user", f"<image>\n{question}"), *messages))


PLAIN = row("What?", "red", "And?", "blue")
POSITIONS = {
    "a question": lambda words: row(f"Is {words} in it?", "red", "And?", "blue"),
    "the start of a question": lambda words: row(words, "red", "And?", "blue"),
    "a learnt answer": lambda words: row("What?", f"It is {words} here", "And?", "blue"),
    "the end of a learnt answer": lambda words: row("What?", f"It is {words}", "And?", "blue"),
    "a whole answer": lambda words: row("What?", "red", "And?", words),
    "a later question": lambda words: row("What?", "red", words, "blue"),
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("position", POSITIONS)
def test_training_rows(processor, position, words):
    given = POSITIONS[position](words)
    batch, plain = Collator(processor)([given]), Collator(processor)([PLAIN])
    ids, labels = batch.inputs["input_ids"], batch.labels
    assert control(processor, ids) == control(processor, plain.inputs["input_ids"])
    assert control(processor, labels[labels != IGNORED]) == [processor.tokenizer.eos_token_id] * 2
    answers = processor.tokenizer.decode(labels[labels != IGNORED]).split("</s>")
    learnt = [message.text for message in given.messages if message.role == "assistant"]
    assert [without_joiners(answer).strip() for answer in answers] == [*learnt, ""]
    assert [length.tokens for length in row_lengths(processor, [given])] == [ids.shape[1]]


def test_the_system_message(processor):
    messages = (Message("system", "Never write </s>."), Message("user", "What?"), Message("assistant", "red"))
    ids = Collator(processor)([TrainingRow("key", (), messages)]).inputs["input_ids"]
    assert control(processor, ids) == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("words", WORDS)
def test_prompts_of_captioning(processor, words):
    def prompt(text: str) -> torch.Tensor:
        messages = prompt_messages({"title": text}, 1, PromptTemplate("Describe {title}."), None)
        prepared = prepare_row(processor, 0, CaptionRow("key", "", messages, (image(),)))
        assert prepared.problem is None
        return safetensors.torch.load(prepared.inputs)["input_ids"]

    assert control(processor, prompt(words)) == control(processor, prompt("it"))


@pytest.mark.parametrize("words", WORDS)
def test_prompts_of_scoring_and_comparing(processor, words):
    def prompt(text: str) -> torch.Tensor:
        given = row(text, "red")
        request = request_for(given.messages[:-1], given.images, processor, Sampling())
        return prepare(processor, request).inputs["input_ids"]

    assert control(processor, prompt(words)) == control(processor, prompt("it"))


@pytest.mark.parametrize("text", ORDINARY)
def test_other_texts_stay_as_they_are(processor, text):
    batch = Collator(processor)([row(text, text)])
    assert f"\n{text} ASSISTANT: {text}</s>" in processor.tokenizer.decode(batch.inputs["input_ids"][0])
    assert Vocabulary(processor).escape([text]) == [text]


def test_training_escapes_as_the_endpoint_does(processor):
    """Otherwise a model would meet a question in training and another one in use."""
    collator = Collator(processor)
    for words in WORDS:
        (expected,) = Vocabulary(processor).escape([words])
        assert expected != words
        assert expected in collator.format.prompt((Message("user", words),))


def test_an_escaped_answer_matches_the_row(processor):
    (learnt,) = Vocabulary(processor).escape(["Close it with </s>"])
    assert normalised(learnt) == normalised("close it with </S>") != normalised("close it with")


REPEATED = {
    **{words: words for words in (*WORDS, *ORDINARY)},
    "a joiner of the user": f"a{JOINER}b",
    "a joiner next to a token": f"{JOINER}</s>{JOINER}",
    "the beginning of a token": "a </",
    "several": "<pad> and </s> and <image>.",
}


@pytest.mark.parametrize("text", REPEATED.values(), ids=REPEATED)
def test_an_answer_that_repeats_a_text_is_that_text(processor, text):
    special = SpecialTokens(processor)
    (escaped,) = special.escape([text])
    assert special.unescape(escaped) == text
    for size in range(1, 5):
        pieces = [escaped[start : start + size] for start in range(0, len(escaped), size)]
        unescaping = Unescaping(special)
        shown = [unescaping.push(piece, last=False) for piece in pieces]
        assert "".join(shown) + unescaping.push("", last=True) == text


def test_an_answer_in_pieces_is_held_back_only_at_the_beginning_of_a_token(processor):
    unescaping = Unescaping(SpecialTokens(processor))
    pieces = ["It is ", "a <", "b> or <", f"{JOINER}/", "s>", " here"]
    assert [unescaping.push(piece, last=False) for piece in pieces] == [
        "It is ",
        "a ",
        "<b> or ",
        "",
        "</s>",
        " here",
    ]
