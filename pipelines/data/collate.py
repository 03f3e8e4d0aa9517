"""Turn rows into model inputs, for any Hugging Face processor with a chat template.

The labels are the assistant's answers with their end tokens. `pipelines.data.chat` locates the answers in
characters of the rendered text. The offsets of the tokens map them to tokens, corrected for the placeholders
that the processor expands to hundreds of visual tokens each.
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
"""Label of a position without a loss."""

OnUnreadable = Callable[[TrainingRow, ImageError], None]
"""Called with a row whose images cannot be opened, and the error. Returns to leave the row out, or raises."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass over B rows of at most T tokens, padded on the right.

    Attributes:
        inputs: keyword arguments of the model.
        labels: (B, T) token ids; `IGNORED` at positions without a loss.
        images: number of images in all rows.
        keys: the rows' keys.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    images: int
    keys: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """The number of rows, B."""
        return len(self.labels)

    @property
    def tokens(self) -> int:
        """The number of input tokens, including visual tokens and without padding."""
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True))


def open_images(
    rows: Sequence[TrainingRow], on_unreadable: OnUnreadable | None
) -> tuple[list[TrainingRow], list[list[Image.Image]]]:
    """Return the rows whose images can be opened, and the images of each.

    An `ImageError` is passed to ``on_unreadable``, or raised if that is None.
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
    """Makes a `Batch` of training rows."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.format = ChatFormat(processor)

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        """Open the rows' images and encode the rows. Raise `DataError` for an unusable image."""
        return self.encode(*open_images(rows, None))

    def readable(self, rows: Sequence[TrainingRow], on_unreadable: OnUnreadable) -> Batch | None:
        """Encode the rows whose images can be opened; return None if there are none."""
        rows, images = open_images(rows, on_unreadable)
        return self.encode(rows, images) if rows else None

    def encode(self, rows: Sequence[TrainingRow], images: Sequence[Sequence[Image.Image]]) -> Batch:
        """Encode rows with their opened images."""
        rendered = [self.format.render(row.messages) for row in rows]
        processor = self.format.processor
        inputs = encode(processor, [r.text for r in rendered], images, padding_side="right", offsets=True)
        offsets: torch.Tensor = inputs.pop("offset_mapping")
        replacements = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        if any(len(found) != len(row.images) for found, row in zip(replacements, rows, strict=True)):
            raise ConfigError(
                f"{type(processor).__name__} does not report the positions of visual tokens, so "
                "answers cannot be located: use a processor that supports return_text_replacement_offsets"
            )
        in_answer = torch.zeros(offsets.shape[:2], dtype=torch.bool)
        for row, (text, found) in enumerate(zip(rendered, replacements, strict=True)):
            for start, end in text.answers:
                gained = sum(_gain(r) for r in found if r["span"][1] <= start)
                # Padding and added special tokens have width zero and overlap nothing.
                in_answer[row] |= (offsets[row, :, 0] < end + gained) & (offsets[row, :, 1] > start + gained)
        labels = inputs["input_ids"].masked_fill(~in_answer, IGNORED)
        return Batch(inputs, labels, images=sum(map(len, images)), keys=tuple(row.key for row in rows))


def _gain(replacement: Mapping[str, tuple[int, int]]) -> int:
    """Return by how many characters the text grew where a placeholder was expanded."""
    (start, end), (new_start, new_end) = replacement["span"], replacement["new_span"]
    return (new_end - new_start) - (end - start)
