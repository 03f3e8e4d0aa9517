"""Assign rows to steps: batches of similar length, the same after every restart.

A batch is a pure function of ``(lengths, batch size, seed, step)``. A run therefore resumes at any step, and
on any number of workers, with the batches it would have had.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from pipelines._compat import visual_token_counter
from pipelines.data.chat import ChatFormat, encode, tokenizer_panics
from pipelines.data.rows import TrainingRow
from pipelines.shared.console import say
from skipvision.config import SkipConfig

T = TypeVar("T")
R = TypeVar("R")

_WINDOW = 64
"""Lengths are sorted within the rows of this many batches: enough to avoid padding and still shuffle."""

_PROGRESS_SECONDS = 5.0


class LengthGroupedBatches:
    """Global batches of row indices, shuffled in every epoch. The last batch of an epoch may be short."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed = batch_size, seed
        self._epoch, self._order = -1, list[np.ndarray]()

    @property
    def per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the rows of one step (from 0), the longest first."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return [int(row) for row in self._order[position]]

    def share(self, step: int, rank: int, workers: int, micro_batch_size: int | None) -> list[list[int]]:
        """Return one worker's rows of a step, grouped into forward passes of max ``micro_batch_size`` rows.

        A worker gets every n-th row of the batch, which is sorted by length, so that all workers compute
        about the same amount.
        """
        rows = self.batch(step)[rank::workers]
        size = micro_batch_size or max(1, len(rows))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        rows = rng.permutation(len(self.lengths))
        window = self.batch_size * _WINDOW
        batches: list[np.ndarray] = []
        for start in range(0, len(rows), window):
            some = rows[start : start + window]
            some = some[np.argsort(-self.lengths[some], kind="stable")]
            batches += [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
        order = rng.permutation(len(batches))
        if epoch == 0:
            # The longest batch comes first, so that a lack of memory shows at the first step.
            longest = max(range(len(batches)), key=lambda b: int(self.lengths[batches[b][0]]))
            order = np.concatenate([[longest], order[order != longest]])
        return [batches[b] for b in order]


class RowLength(NamedTuple):
    """Tokens of a row, visual tokens included: all of them, and those that the decoder computes."""

    tokens: int
    computed: int


def row_lengths(
    processor: ProcessorMixin, rows: Sequence[TrainingRow], skip: SkipConfig | None = None
) -> list[RowLength]:
    """Return the lengths of each row under a SkipConfig, without decoding an image.

    Image files are opened for their size, and only if the processor's token count depends on it. Progress is
    printed every few seconds. If the count needs pixels, ``computed`` equals ``tokens``.
    """
    shown = time.monotonic()
    chat = ChatFormat(processor)
    count_visual = _visual_token_counter(processor)
    lengths: list[RowLength] = []
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024]
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            say(f"{start} of {len(rows)} rows measured")
        texts = [chat.render(row.messages).text for row in some]
        if count_visual is None:
            encoded = [_encoded_length(processor, *pair) for pair in zip(texts, some, strict=True)]
            lengths += [RowLength(tokens, tokens) for tokens in encoded]
            continue
        # The tokenizer sees each placeholder as one token.
        for ids, row in zip(_token_ids(processor, texts), some, strict=True):
            visual = count_visual(row)
            text = len(ids) - len(row.images)
            reduced = visual if skip is None else [skip.counts(tokens).total for tokens in visual]
            lengths.append(RowLength(text + sum(visual), text + sum(reduced)))
    return lengths


def _token_ids(processor: ProcessorMixin, texts: Sequence[str]) -> list[list[int]]:
    bos = processor.tokenizer.bos_token
    add_special = bos is None or not texts[0].startswith(bos)
    with tokenizer_panics(processor):
        ids: list[list[int]] = processor.tokenizer(list(texts), add_special_tokens=add_special)["input_ids"]
    return ids


def _visual_token_counter(processor: ProcessorMixin) -> Callable[[TrainingRow], list[int]] | None:
    """Return a function that counts a row's visual tokens per image; None if that needs the pixels."""
    count = visual_token_counter(processor)
    if count is None:
        return None
    probes = [(64, 64), (64, 1024), (1024, 64), (1500, 1500)]
    numbers = set(count(probes))
    if len(numbers) == 1:
        constant = numbers.pop()
        return lambda row: [constant] * len(row.images)

    def counter(row: TrainingRow) -> list[int]:
        sizes = [image.open().size for image in row.images]
        return count([(height, width) for width, height in sizes]) if sizes else []

    return counter


def _encoded_length(processor: ProcessorMixin, text: str, row: TrainingRow) -> int:
    images: list[list[Image.Image]] = [[image.open() for image in row.images]]
    return int(encode(processor, [text], images, padding_side="right")["input_ids"].shape[1])


def prefetched(make: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Yield ``make(item)`` for each item in order; a thread computes up to ``ahead`` results in advance.

    One thread is enough to open the next step's images while the model computes, and fast tokenizers must not
    be shared between threads.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(make, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
