"""Render conversations with a processor's chat template, and locate the answers in the rendered text.

The answers are located in characters: by the template's ``{% generation %}`` marks or, in a template without
them, by rendering the conversation up to the answer and including it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from pipelines.data.rows import IMAGE_PLACEHOLDER, Message
from pipelines.data.special_tokens import SpecialTokens, special_tokens_of
from skipvision._compat import is_panic
from skipvision.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation with one placeholder per image.

    Attributes:
        text: the conversation as the template renders it.
        answers: (start, end) characters of each answer, including the token that ends it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatFormat:
    """Renders conversations for one processor and locates their answers."""

    def __init__(self, processor: ProcessorMixin) -> None:
        template = processor.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if not template:
            raise ConfigError(
                f"{type(processor).__name__} has no chat template, which training rows need; set one on the "
                "processor"
            )
        self.processor, self.tokenizer = processor, processor.tokenizer
        self._template: str = template
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        self._ends = _end_tokens(processor)
        self.special = SpecialTokens(processor)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the rendered conversation, up to the start of the assistant's next answer."""
        return self._write(messages, add_generation_prompt=True)[0]

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return the rendered conversation and its answers. Raise `ConfigError` if they cannot be located."""
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
                            f"the chat template of {type(self.processor).__name__} rewrites earlier turns, "
                            "so the answers cannot be located: add {% generation %} marks to it"
                        )
                    spans.append((len(before), len(after)))
        return self._close_answers(text, spans)

    def _write(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, mark_answers: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        # Annotated as texts, the spans are a list of (start, end) for each conversation.
        rendered: Any = render_jinja_template(
            conversations=[_template_messages(messages, self.special)],
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=mark_answers,
            **self.tokenizer.special_tokens_map,
        )
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if mark_answers else []

    def _close_answers(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """End every answer with exactly one end token, without the white space that templates append.

        If the template's own token follows the answer, it is used. Otherwise the tokenizer's end-of-sequence
        token is inserted: a model trained on answers without an end would never stop.
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
    """Return rendered texts and their images as padded model inputs.

    With ``offsets`` they include ``offset_mapping`` (B, T, 2) and, per row, ``text_replacement_offsets``: the
    span of each placeholder and of the text that the processor put in its place.
    """
    options: dict[str, Any] = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
    if offsets:
        options |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    if _writes_bos(processor, texts):
        options["add_special_tokens"] = False
    nested = [list(row) for row in images]
    with tokenizer_panics(processor):
        return dict(processor(text=list(texts), images=nested if any(nested) else None, **options))


@contextmanager
def tokenizer_panics(processor: Any) -> Iterator[None]:
    """Raise a panic of a tokenizer, whose pattern may take too many steps, as a `ConfigError`."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ConfigError(
            f"the tokenizer of {type(processor).__name__} fails on a text ({error}): use another model"
        ) from error


def chat_messages(messages: Sequence[Message], processor: Any) -> list[dict[str, Any]]:
    """Return messages as engines expect them: role and parts, in whose texts special tokens are escaped."""
    return _template_messages(messages, special_tokens_of(processor))


def _template_messages(messages: Sequence[Message], special: SpecialTokens) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": _content_parts(m.text, special)} for m in messages]


def _content_parts(text: str, special: SpecialTokens) -> list[dict[str, str]]:
    """Return a message's content as templates expect it: images and the text between them, in order."""
    # Templates add their own white space around an image; LLaVA's files add a line break, too.
    pieces = [piece.strip() for piece in text.split(IMAGE_PLACEHOLDER)]
    escaped = iter(special.escape([piece for piece in pieces if piece]))
    parts: list[dict[str, str]] = []
    for position, piece in enumerate(pieces):
        if position:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": next(escaped)})
    return parts


def _end_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """Return the special tokens that may end an answer: not those of beginning, padding or images."""
    tokenizer = processor.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token, IMAGE_PLACEHOLDER}
    others |= set(processor.all_special_multimodal_tokens)
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, which answers must end with; set its "
            "eos_token"
        )
    return tuple(sorted((special - others) | {tokenizer.eos_token}))


def _writes_bos(processor: ProcessorMixin, texts: Sequence[str]) -> bool:
    """Return whether the template writes the beginning-of-sequence token: the tokenizer must not add one."""
    bos = processor.tokenizer.bos_token
    return bos is not None and bool(texts) and texts[0].startswith(bos)
