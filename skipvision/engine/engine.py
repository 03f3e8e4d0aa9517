"""`Engine`: continuous batching of image prompts over pruned KV caches.

The engine puts the parts together and drives them. `Intake` turns a request into a `SequenceGroup`, the
`Scheduler` admits it, `PrefillStage` and `DecodeStage` run the model, and `Finisher` ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from skipvision._compat_onednn import multiplies_packed
from skipvision.attach import attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.engine.adapters import Adapters
from skipvision.engine.decoding import DecodeStage
from skipvision.engine.finishing import Finisher
from skipvision.engine.intake import Intake
from skipvision.engine.model import ModelFacts
from skipvision.engine.packing import PackedWeights
from skipvision.engine.prefill_stage import PrefillStage
from skipvision.engine.prefiller import Prefiller
from skipvision.engine.prefixes import PrefixCache
from skipvision.engine.requests import Chunk, Completion, Request, Timing, Usage
from skipvision.engine.running import Running
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.statistics import Counters, Statistics
from skipvision.errors import ConfigError, InputError, SkipVisionError
from skipvision.plan import TokenPlan


class Engine:
    """Answers many requests with one model, each as if it ran alone.

    Not thread-safe: call `submit`, `step`, `plan` and `cancel` from one thread.

    Args:
        model: with Skip-Vision attached (`load_adapter`) or without. Do not use it elsewhere until `close`.
        processor: the model's processor. None = requests come prepared, and answers have no text.
        config: SkipConfig of requests that name neither a SkipConfig nor an adapter. None = the attached one,
            or `SkipConfig()`.
        max_sequences: max answers that are generated at once.
        kv_budget_bytes: size of the KV cache. All of it is allocated at the first request, but no more than
            max_sequences of the model's max length can use.
        prefill_tokens: max prompt tokens that one step prefills, as callers count them. It bounds how long
            running answers wait for their next token. A longer prompt is prefilled alone.
        prefix_cache_bytes: size of the cache for images that come again; 0 = no cache.
        compile_decoding: run decode steps through ``torch.compile``; a string names the backend. Rows and
            lengths are then rounded to few sizes, so that few graphs are compiled.
        pack_weights: hold the bfloat16 weights of linear layers in the layout that the CPU reads fastest,
            until `close` restores them. No effect in other dtypes, on hardware that does not multiply
            bfloat16, next to adapters that read weights (docs/engine.md), and with ``compile_decoding``.

    Raises:
        ConfigError: an argument is out of range, the model cannot run under the config, or its
            ``generation_config`` has a setting that the engine cannot apply.
        UnsupportedModelError: as `attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        config: SkipConfig | None = None,
        *,
        max_sequences: int = 16,
        kv_budget_bytes: int = 2**30,
        prefill_tokens: int = 4096,
        prefix_cache_bytes: int = 0,
        compile_decoding: bool | str = False,
        pack_weights: bool = True,
    ) -> None:
        _check_numbers(
            max_sequences=(max_sequences, 1),
            kv_budget_bytes=(kv_budget_bytes, 1),
            prefill_tokens=(prefill_tokens, 1),
            prefix_cache_bytes=(prefix_cache_bytes, 0),
        )
        self.processor = processor
        self._facts = facts = ModelFacts.of(model.eval())
        attached = attachment_of(model)
        self._attachment = attached or attach(model, config or SkipConfig())
        self._detach_on_close = attached is None
        config = config or self._attachment.config
        trained = SkipConfig.full() if attached is None else attached.config
        packable = multiplies_packed if pack_weights and not compile_decoding else None
        self._weights = PackedWeights(model, packable)
        try:
            self._attachment.check(config)
            self._adapters = Adapters(model, self._attachment, config, trained, self._weights)
            self._intake = Intake(processor, facts, self._attachment, self._adapters, config)
        except BaseException:
            if self._detach_on_close:
                self._attachment.detach()
            raise

        row_multiple, length_multiple = (8, 64) if compile_decoding else (1, 8)
        capacity = kv_budget_bytes // facts.entry_bytes
        if facts.max_positions is not None:
            capacity = min(capacity, max_sequences * (facts.max_positions + length_multiple))
        self._scheduler = Scheduler(capacity, max_sequences, prefill_tokens, row_multiple, length_multiple)
        self._running = Running(facts, self._adapters, self._scheduler, compile_decoding)
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._prefiller = Prefiller(facts.base, self._attachment, facts.image_token_id, facts.text_config)
        self._counters = Counters()
        self._finisher = Finisher(self._scheduler, self._running, self._counters, facts.entry_bytes)
        self._decoding = DecodeStage(self._running, self._finisher, self._counters, facts)
        self._prefilling = PrefillStage(
            prefiller=self._prefiller,
            prefixes=self._prefixes,
            adapters=self._adapters,
            scheduler=self._scheduler,
            running=self._running,
            decoding=self._decoding,
            finisher=self._finisher,
            counters=self._counters,
            facts=facts,
        )
        self._groups = self._finisher.groups
        self._pending: list[Chunk] = []
        self._adapters.pack_weights()

    def prepare(self, request: Request) -> Request:
        """Run this engine's processor on a request; raises `InputError`. See `skipvision.engine.prepare`."""
        return self._intake.prepare(request)

    def submit(self, request: Request) -> int:
        """Append a request to the queue.

        Returns:
            The id of the request, as in its chunks and for `cancel`.

        Raises:
            InputError: the request cannot be prepared, or is longer than the model can read.
            ConfigError: its SkipConfig or adapter does not fit this model.
            ResourceError: it does not fit into the KV budget, even alone.
        """
        try:
            group = self._intake.group(request)
            self._scheduler.submit(group)
        except SkipVisionError:
            raise
        except Exception as error:
            raise InputError(f"this request cannot be read ({type(error).__name__}): {error}") from error
        self._groups[group.number] = group
        return group.number

    @torch.no_grad()
    def plan(self, request: Request) -> TokenPlan:
        """Return the `TokenPlan` of a request's prompt, (1, T) → (1, L), without answering it.

        This prefills the prompt.

        Raises:
            SkipVisionError: as `submit`.
            InputError: the request has no image.
        """
        group = self._intake.group(request)
        self._scheduler.check(group)
        self._adapters.activate(group.adapter)
        self._prefiller.from_start([group.prompt], group.config)
        plan = self._attachment.plan
        if plan is None:
            raise InputError("this request has no image: only requests with images have a plan")
        return plan

    def cancel(self, number: int) -> bool:
        """End a request and free its rows; the next `step` returns its last chunks.

        Returns:
            False if the request has already ended.
        """
        group = self._groups.get(number)
        if group is None:
            return False
        self._pending += self._finisher.end(group, "cancelled")
        return True

    @property
    def busy(self) -> bool:
        """Whether `step` has work to do or chunks to return."""
        return bool(self._groups or self._pending)

    @torch.no_grad()
    def step(self) -> list[Chunk]:
        """Admit and prefill waiting requests, and decode one token of every running sequence.

        Returns:
            The text and tokens that this step added, and the requests that it ended.
        """
        chunks, self._pending = self._pending, []
        for group in [group for group in self._groups.values() if group.expired]:
            chunks += self._finisher.end(group, "deadline")
        admitted = self._scheduler.admit([sequence.group for sequence in self._running.sequences])
        chunks += self._prefilling.step(admitted)
        if self._running.sequences:
            chunks += self._decoding.step()
        return chunks

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer all requests; completions come in the order in which they end.

        Requests are taken from the iterable as the queue empties. A request that fails is returned with its
        ``error``, and the others continue.
        """
        remaining = iter(requests)
        more = True
        while more or self.busy:
            while more and len(self._scheduler.waiting) < 2 * self._scheduler.max_rows:
                request = next(remaining, None)
                more = request is not None
                if request is None:
                    break
                try:
                    self.submit(request)
                except SkipVisionError as error:
                    yield Completion(request, -1, (), Usage(), Timing(0.0, None, 0.0), error)
            for chunk in self.step():
                if chunk.completion is not None:
                    yield chunk.completion

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Load a saved adapter; from now on requests can name it.

        Its requests run under the SkipConfig that it was trained with. All adapters with a summary layer must
        have the same number of summary tokens.

        Raises:
            AdapterError: as `load_adapter`; also if the folder has no LoRA.
            ConfigError: the name is in use or invalid, or the SkipConfig does not fit this model.
        """
        self._adapters.add(name, Path(folder))

    def remove_adapter(self, name: str) -> None:
        """Unload an adapter; raises `ConfigError` if open requests use it."""
        self._adapters.check_removable(name)
        busy = sum(group.adapter == name for group in self._groups.values())
        if busy:
            raise ConfigError(f"{busy} requests run under adapter {name!r}: wait for them, or cancel them")
        self._adapters.remove(name)
        self._prefixes.clear()

    @property
    def adapters(self) -> list[str]:
        """Names that requests can give as ``adapter``; "__base__" is the model without an adapter."""
        return self._adapters.names

    @property
    def configs(self) -> dict[str, SkipConfig]:
        """SkipConfig of the requests of each adapter."""
        return self._adapters.configs

    @property
    def ending(self) -> frozenset[int]:
        """Tokens that end any answer."""
        return self._facts.generation.eos_token_ids

    @property
    def vocabulary(self) -> int:
        """Number of logits for each token."""
        return self._facts.outputs

    def statistics(self) -> Statistics:
        """Return a snapshot of the queue, the KV cache, and all counters."""
        return self._counters.snapshot(
            self._running, self._scheduler, self._prefixes, self._facts.entry_bytes, self._weights.nbytes
        )

    def close(self) -> None:
        """Drop all requests, and release the model with its weights; detach what the engine attached."""
        self._running.clear()
        self._groups.clear()
        self._scheduler.waiting.clear()
        self._prefixes.clear()
        self._adapters.clear()
        self._weights.unpack()
        if self._detach_on_close:
            self._attachment.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_numbers(**numbers: tuple[int, int]) -> None:
    """Raise `ConfigError` unless each value is an integer of at least its minimum."""
    problems = [
        f"{name}={value!r}: expected an integer of {minimum} or more"
        for name, (value, minimum) in numbers.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum
    ]
    if problems:
        raise ConfigError("Engine: " + "; ".join(problems))
