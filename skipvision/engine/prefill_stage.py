"""The prefill step: group admitted requests, prefill them together, and give each sequence a row."""

from __future__ import annotations

import time
from collections import abc
from typing import Any

import torch

from skipvision.engine.adapters import Adapters
from skipvision.engine.decoding import DecodeStage
from skipvision.engine.finishing import Finisher
from skipvision.engine.model import ModelFacts
from skipvision.engine.prefiller import Prefilled, Prefiller
from skipvision.engine.prefixes import PrefixCache
from skipvision.engine.requests import Chunk
from skipvision.engine.running import Running
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import SequenceGroup
from skipvision.engine.statistics import Counters
from skipvision.errors import ResourceError


class PrefillStage:
    """Prefills admitted requests and starts their sequences.

    If a batch fails, each of its requests is prefilled alone, so only the broken one ends with an error.

    Args:
        prefiller: runs prompts through the model.
        prefixes: cached prefixes of earlier prompts.
        adapters: activates the adapter of each batch.
        scheduler: decides whether the prefilled sequences fit.
        running: receives the sequences.
        decoding: chooses the first token of each sequence.
        finisher: ends requests that fail.
        counters: count tokens and seconds.
        facts: whether the model's prompts may be split and batched.
    """

    def __init__(
        self,
        *,
        prefiller: Prefiller,
        prefixes: PrefixCache,
        adapters: Adapters,
        scheduler: Scheduler,
        running: Running,
        decoding: DecodeStage,
        finisher: Finisher,
        counters: Counters,
        facts: ModelFacts,
    ) -> None:
        self._prefiller, self._prefixes, self._adapters = prefiller, prefixes, adapters
        self._scheduler, self._running, self._decoding = scheduler, running, decoding
        self._finisher, self._counters, self._facts = finisher, counters, facts

    def step(self, admitted: abc.Sequence[SequenceGroup]) -> list[Chunk]:
        """Prefill admitted requests in as few calls as possible; returns first tokens and failures."""
        chunks: list[Chunk] = []
        for batch in self._batches(admitted):
            chunks += self._prefill(batch)
        return chunks

    def _batches(self, admitted: abc.Sequence[SequenceGroup]) -> abc.Iterator[list[SequenceGroup]]:
        """Split requests by SkipConfig, adapter, and whether their prefix is cached."""
        batches: dict[Any, list[SequenceGroup]] = {}
        begun: set[Any] = set()
        for group in admitted:
            key = self._prefix_key(group)
            known = key is not None and (key in begun or key in self._prefixes)
            alone = None if self._facts.batches_prompts else group.number
            batches.setdefault((known, group.config, group.adapter, alone), []).append(group)
            begun.add(key)
        # New prompts first: they may compute the prefixes of the others.
        yield from (batch for (known, *_), batch in batches.items() if not known)
        yield from (batch for (known, *_), batch in batches.items() if known)

    def _prefix_key(self, group: SequenceGroup) -> Any:
        """Return the key of a prompt's prefix, or None if the prefix cannot be cached."""
        # If the criterion sees the prompt, text after the images decides which visual tokens stay.
        splits = self._facts.splits_prompts and not group.config.criterion.sees_prompt
        # A prefix has one number of entries for all layers.
        splits = splits and group.config.drop_after is None
        if not self._prefixes.limit or not group.prompt.prefix_length or not splits:
            return None
        return group.prompt.prefix_digest, group.config, group.adapter

    def _prefill(self, batch: list[SequenceGroup]) -> list[Chunk]:
        begin = time.monotonic()
        for group in batch:
            group.began = group.began or begin
        try:
            filled = self._run(batch)
        except torch.AcceleratorError:
            raise  # a failed device cannot run the other requests either
        except Exception as error:
            if len(batch) > 1:
                return [chunk for group in batch for chunk in self._prefill([group])]
            return self._finisher.fail(batch[0], error)
        kept = filled.stay.sum(dim=1).tolist()
        for group, visual, entries in zip(batch, filled.visual, kept, strict=True):
            group.visual, group.entries = visual, entries
        if (later := filled.staying_later()) is not None:
            after, _, _, left = later
            for group, entries in zip(batch, left, strict=True):
                group.absent_bytes = (group.entries - entries) * sum(self._facts.layer_bytes[after + 1 :])
        sequences = [sequence for group in batch for sequence in group.sequences]
        together = [*self._running.sequences, *sequences]
        if not self._scheduler.fits(len(together), max(each.group.reserved for each in together)):
            return self._requeue(batch)
        rows = [row for row, group in enumerate(batch) for _ in group.sequences]
        self._running.add(sequences, rows, filled)
        for group in batch:
            group.prompt.inputs.clear()  # the pixels are no longer needed
        self._counters.count_prefill(batch, time.monotonic() - begin)
        return self._decoding.append_tokens(sequences, filled.logits[rows])

    def _run(self, batch: list[SequenceGroup]) -> Prefilled:
        """Run a batch from its cached prefixes, or from the start if one of them is missing."""
        first, prompts = batch[0], [group.prompt for group in batch]
        self._adapters.activate(first.adapter)
        keys = [self._prefix_key(group) for group in batch]
        found = [self._prefixes.find(key) for key in keys if key is not None]
        cached = [prefix for prefix in found if prefix is not None]
        if len(cached) == len(batch):
            for group in batch:
                group.prefix_hit = True
            return self._prefiller.from_prefixes(cached, prompts)
        filled = self._prefiller.from_start(prompts, first.config)
        for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            if key is not None:
                self._prefixes.put(key, filled.prefix(row, prompt.prefix_length))
        return filled

    def _requeue(self, batch: list[SequenceGroup]) -> list[Chunk]:
        """Return requests to the head of the queue; those that can never fit fail.

        Their images kept more tokens than planned from the placeholders. The plan is exact from now on.
        """
        failed: list[Chunk] = []
        for group in reversed(batch):
            try:
                self._scheduler.check(group)
                self._scheduler.waiting.appendleft(group)
            except ResourceError as error:
                failed += self._finisher.fail(group, error)
        return failed
