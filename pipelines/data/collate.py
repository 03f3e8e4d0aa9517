"""Rows to model inputs, for any Hugging Face processor with a chat template.

A row's conversation is written by the processor's own template, and what is learnt are the assistant's
answers with the token that ends each. Where the answers stand is known in characters of the rendered
text: from the template's ``{% generation %}`` marks, or, in a template without them, by rendering the
conversation up to the answer and including it. From characters it is carried to tokens past the
placeholders, which the processor blows up to hundreds of visual tokens each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from pipelines.data.images import ImageError
from pipelines.data.rows import IMAGE_PLACEHOLDER, Message, TrainingRow
from skipvision.errors import ConfigError

IGNORED = -100
"""Label of a position that is not learnt."""

OnUnreadable = Callable[[TrainingRow, ImageError], None]
"""Told of a row whose images cannot be opened, and why; leaves it out by returning, or raises."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation in the template's words, one placeholder per image.

    ``answers`` holds the (start, end) characters of each answer together with the token that ends it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass over B rows of at most T tokens, padded on the right.

    ``inputs`` are the model's keyword arguments; ``labels`` (B, T) is `IGNORED` wherever nothing is learnt.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    images: int

    @property
    def rows(self) -> int:
        """B."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """Input tokens, visual ones included, padding not."""
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True))


class ChatFormat:
    """How one processor writes conversations, and where the answers are in what it wrote."""

    def __init__(self, processor: ProcessorMixin) -> None:
        template = processor.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise ConfigError(f"{type(processor).__name__} has no chat template; training rows need one")
        self.processor, self.tokenizer = processor, processor.tokenizer
        self._template: str = template
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        self._ends = _end_tokens(processor)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation so far, up to where the assistant is to speak."""
        return self._write(messages, add_generation_prompt=True)[0]

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation, and its answers."""
        if self._marks_answers:
            text, spans = self._write(messages, mark_answers=True)
        else:
            text, spans = self._write(messages)[0], []
            for position, message in enumerate(messages):
                if message.role == "assistant":
                    before = self.prompt(messages[:position])
                    after, _ = self._write(messages[: position + 1])
                    if not (text.startswith(after) and after.startswith(before)):
                        raise ConfigError(
                            f"the chat template of {type(self.processor).__name__} rewrites earlier turns "
                            "and has no {% generation %} marks, so what is to be learnt cannot be told: "
                            "add the marks"
                        )
                    spans.append((len(before), len(after)))
        return self._close_answers(text, spans)

    def _write(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, mark_answers: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            conversations=[[{"role": m.role, "content": content_parts(m.text)} for m in messages]],
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=mark_answers,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in spans[0]] if mark_answers else []

    def _close_answers(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """Let every answer end in exactly one end token, without the white space templates put behind.

        The token is the template's own if one stands there; a template that ends answers with nothing
        would teach a model never to stop, so there the tokenizer's end-of-sequence token is put in.
        """
        pieces: list[str] = []
        answers = []
        done = written = 0
        for start, end in spans:
            stop = start + len(text[start:end].rstrip())
            missing = ""
            if not text.endswith(self._ends, start, stop):
                follows = next((token for token in self._ends if text.startswith(token, stop)), "")
                stop += len(follows)
                missing = "" if follows else self.tokenizer.eos_token
            answer_start = written + start - done
            pieces += [text[done:stop], missing]
            written += stop - done + len(missing)
            done = stop
            answers.append((answer_start, written))
        return Rendered("".join([*pieces, text[done:]]), tuple(answers))


def encode(
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Sequence[Any]],
    *,
    padding_side: str,
    offsets: bool = False,
) -> dict[str, Any]:
    """Rendered texts and each one's images as padded model inputs.

    With ``offsets`` also ``offset_mapping`` (B, T, 2), and per row ``text_replacement_offsets``: where
    the processor has put how much in place of a placeholder.
    """
    options: dict[str, Any] = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    if offsets:
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    if _writes_bos(processor, texts):
        options["add_special_tokens"] = False
    nested = [list(row) for row in images]
    return dict(processor(text=list(texts), images=nested if any(nested) else None, **options))


def open_images(
    rows: Sequence[TrainingRow], on_unreadable: OnUnreadable | None
) -> tuple[list[TrainingRow], list[list[Image.Image]]]:
    """The rows whose images can be opened, and each one's images.

    An `ImageError` goes to ``on_unreadable``; without one it is raised.
    """
    readable, images = [], []
    for row in rows:
        try:
            opened = [image.open() for image in row.images]
        except ImageError as error:
            if on_unreadable is None:
                raise
            on_unreadable(row, error)
        else:
            readable.append(row)
            images.append(opened)
    return readable, images


class Collator:
    """Training rows to a `Batch`."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.format = ChatFormat(processor)

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Open the rows' images and encode everything; `DataError` for an image that cannot be used."""
        return self.encode(*open_images(rows, None))

    def readable(self, rows: Sequence[TrainingRow], on_unreadable: OnUnreadable) -> Batch | None:
        """The same of the rows whose images can be opened; None if there is none."""
        rows, images = open_images(rows, on_unreadable)
        return self.encode(rows, images) if rows else None

    def encode(self, rows: Sequence[TrainingRow], images: Sequence[Sequence[Image.Image]]) -> Batch:
        """Rows whose images are open already."""
        rendered = [self.format.render(row.messages) for row in rows]
        processor = self.format.processor
        inputs = encode(processor, [r.text for r in rendered], images, padding_side="right", offsets=True)
        offsets: torch.Tensor = inputs.pop("offset_mapping")
        replacements = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        if any(len(found) != len(row.images) for found, row in zip(replacements, rows, strict=True)):
            raise ConfigError(
                f"{type(processor).__name__} does not say where it puts visual tokens, so the tokens of the "
                "answers cannot be told: a processor that honours return_text_replacement_offsets is needed"
            )
        learnt = torch.zeros(offsets.shape[:2], dtype=torch.bool)
        for row, (text, found) in enumerate(zip(rendered, replacements, strict=True)):
            for start, end in text.answers:
                gained = sum(_gain(r) for r in found if r["span"][1] <= start)
                # Padding and added special tokens have width zero and overlap nothing.
                learnt[row] |= (offsets[row, :, 0] < end + gained) & (offsets[row, :, 1] > start + gained)
        labels = inputs["input_ids"].masked_fill(~learnt, IGNORED)
        return Batch(inputs, labels, images=sum(map(len, images)))


def content_parts(text: str) -> list[dict[str, str]]:
    """A message's content as templates take it: images and the text between them, in order."""
    parts: list[dict[str, str]] = []
    for position, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if position:
            parts.append({"type": "image"})
        # Templates put their own white space around an image; LLaVA's files hold another line break.
        if piece := piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _end_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """The special tokens an answer may end in: all but those that begin, pad or stand for an image."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token, IMAGE_PLACEHOLDER}
    others |= set(processor.all_special_multimodal_tokens)
    if tokenizer.eos_token is None:
        raise ConfigError(f"{type(tokenizer).__name__} has no end-of-sequence token to end answers with")
    return tuple(sorted((special - others) | {tokenizer.eos_token}))


def _writes_bos(processor: ProcessorMixin, texts: Sequence[str]) -> bool:
    """Whether the template has written the beginning-of-sequence token, so that none must be added."""
    bos = processor.tokenizer.bos_token
    return bos is not None and bool(texts) and texts[0].startswith(bos)


def _gain(replacement: Mapping[str, tuple[int, int]]) -> int:
    """Characters that the text grew by where a placeholder was blown up."""
    (start, end), (new_start, new_end) = replacement["span"], replacement["new_span"]
    return (new_end - new_start) - (end - start)
