"""Rows to model inputs, for any Hugging Face processor with a chat template.

A row's conversation is written by the processor's own template, and what is learnt are the assistant's
answers with the token that ends each. Where the answers stand is known in characters of the rendered
text: from the template's ``{% generation %}`` marks, or, in a template without them, by rendering the
conversation up to the answer and including it. From characters it is carried to tokens past the
placeholders, which the processor blows up to hundreds of visual tokens each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from transformers import ProcessorMixin

from pipelines.data.chat import ChatFormat, encode
from pipelines.data.images import ImageError
from pipelines.data.rows import TrainingRow
from skipvision.errors import ConfigError

IGNORED = -100
"""Label of a position that is not learnt."""

OnUnreadable = Callable[[TrainingRow, ImageError], None]
"""Told of a row whose images cannot be opened, and why; leaves it out by returning, or raises."""


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


def _gain(replacement: Mapping[str, tuple[int, int]]) -> int:
    """Characters that the text grew by where a placeholder was blown up."""
    (start, end), (new_start, new_end) = replacement["span"], replacement["new_span"]
    return (new_end - new_start) - (end - start)
