"""`Engine`: many requests through one model, each as if it were alone.

One `Engine.step` lets in waiting requests that fit (`Scheduler`), prefills them together (`Prefiller`), puts
what stays of each into a row of `Slots`, and decodes one token for all rows in use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from skipvision.adapters.files import read_adapter
from skipvision.anatomy.families import dissect
from skipvision.anatomy.masks import Sight
from skipvision.attach import attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.cost import units as unit_costs
from skipvision.engine.adapters import BASE, Adapters
from skipvision.engine.prefill import Prefilled, Prefiller
from skipvision.engine.prefixes import PrefixCache
from skipvision.engine.prompts import Prompt, prepare
from skipvision.engine.requests import (
    Chunk,
    Completion,
    FinishReason,
    Request,
    Sampling,
    Timing,
    TokenLogprob,
    Usage,
)
from skipvision.engine.running import Running
from skipvision.engine.sampling import choose, penalise, report
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import Answer, Ticket
from skipvision.engine.statistics import Counters, Statistics, median_and_tail
from skipvision.errors import (
    ConfigError,
    GenerationError,
    InputError,
    ResourceError,
    SkipVisionError,
    UnsupportedModelError,
)
from skipvision.plan import TokenPlan


class Engine:
    """Continuous batching over pruned KV caches.

    Not thread-safe: `submit`, `step`, `plan` and `cancel` belong to one thread.

    Args:
        model: attached already (`load_adapter`) or not; until `close` it is the engine's alone.
        processor: its processor; None = requests come prepared, and text is left out.
        config: of requests that name none, and no adapter; None = what is attached, or `SkipConfig` as it is.
        max_sequences: answers that are written at once, at most.
        kv_budget_bytes: for keys and values of the answers being written; allocated whole (or as much
            as max_sequences of the model's longest can use) at the first request.
        prefill_tokens: tokens that one step prefills at most, as callers count them (one prompt at least),
            so that those who are being answered need not wait long for the next token.
        prefix_cache_bytes: for keys and values of images that may be asked about again; 0 = none.
        compile_decoding: by ``torch.compile``, with the backend of that name if it is one. Rows and lengths
            then come in few sizes, to compile few.

    Raises:
        ConfigError: numbers that make no sense, or a config that this model cannot run under.
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
    ) -> None:
        _check_numbers(
            max_sequences=(max_sequences, 1),
            kv_budget_bytes=(kv_budget_bytes, 1),
            prefill_tokens=(prefill_tokens, 1),
            prefix_cache_bytes=(prefix_cache_bytes, 0),
        )
        self._processor = processor
        self._base = _base_of(model.eval())
        attached = attachment_of(model)
        self._attachment = attached or attach(model, config or SkipConfig())
        self._detaches = attached is None
        self._config = config or self._attachment.config
        self._attachment.check(self._config)
        self._adapters = Adapters(model)
        trained = SkipConfig.full() if attached is None else attached.config
        self._trained = {name: trained for name in self._adapters.names if name != BASE}

        anatomy = dissect(model)
        self._image_token_id = anatomy.image_token_id
        self._family = anatomy.family
        self._limit: int | None = getattr(anatomy.text_config, "max_position_embeddings", None)
        self._prefiller = Prefiller(self._base, self._attachment, self._image_token_id)

        row_multiple, length_multiple = (8, 64) if compile_decoding else (1, 8)
        design = unit_costs.Design.of(self._base.config)
        values = sum(layer.values for layer in unit_costs.cache(design))
        self._token_bytes = values * next(anatomy.decoder.parameters()).element_size()
        capacity = kv_budget_bytes // self._token_bytes
        if self._limit is not None:
            # More than this could never be used.
            capacity = min(capacity, max_sequences * (self._limit + length_multiple))
        self._scheduler = Scheduler(capacity, max_sequences, prefill_tokens, row_multiple, length_multiple)
        self._running = Running(
            self._base, self._adapters, Sight.of(anatomy.decoder), self._scheduler, compile_decoding
        )
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._numbers = count()
        self._tickets: dict[int, Ticket] = {}
        self._pending: list[Chunk] = []
        self._counters = Counters()
        self._ending, self._suppressed = _generation_settings(self._base)

    # ------------------------------------------------------------------------------- what users call

    def prepare(self, request: Request) -> Request:
        """`prepare` with this engine's processor; raises `InputError`."""
        if request.inputs is None and self._processor is None:
            raise InputError("this engine has no processor: give it one, or requests with inputs")
        return prepare(self._processor, request)

    def submit(self, request: Request) -> int:
        """Put a request in the queue.

        Returns:
            Its number: what chunks and `cancel` call it.

        Raises:
            InputError: it cannot be prepared, or is longer than the model can read.
            ConfigError: its SkipConfig or adapter is not possible here.
            ResourceError: it could never fit into the KV budget.
        """
        try:
            return self._submit(request)
        except SkipVisionError:
            raise
        except Exception as error:
            raise InputError(f"this request cannot be taken ({type(error).__name__}): {error}") from error

    def _submit(self, request: Request) -> int:
        ticket = self._ticket(request)
        self._scheduler.submit(ticket)
        self._tickets[ticket.number] = ticket
        return ticket.number

    @torch.no_grad()
    def plan(self, request: Request) -> TokenPlan:
        """What would become of the tokens of a request's prompt, (1, T) → (1, L). Costs its prefill.

        Raises:
            SkipVisionError: as `submit`.
            InputError: there is no image in it.
        """
        ticket = self._ticket(request)
        self._scheduler.refuse(ticket)
        self._adapters.activate(ticket.adapter)
        self._prefiller.whole([ticket.prompt], ticket.config)
        plan = self._attachment.plan
        if plan is None:
            raise InputError("there is no image in this request: plans are about the tokens of images")
        return plan

    def _ticket(self, request: Request) -> Ticket:
        ready = self.prepare(request)
        name = request.adapter or self._adapters.default
        self._adapters.check(name)
        config = self._config if request.adapter is None else self._config_of(name)
        if isinstance(request.skip, SkipConfig):
            config = request.skip
        self._attachment.check(config)
        prompt = Prompt(ready.inputs or {}, self._image_token_id, len(request.images))
        ticket = Ticket(next(self._numbers), request, prompt, config, name, self._decode)
        end = len(prompt) + request.sampling.max_new_tokens
        if self._limit is not None and end > self._limit:
            raise InputError(
                f"{len(prompt)} tokens of prompt and {request.sampling.max_new_tokens} of answer are more "
                f"than the {self._limit} positions of this model: shorten the prompt, or lower max_new_tokens"
            )
        return ticket

    def cancel(self, number: int) -> bool:
        """End a request now and free its place; False if it is over already. Its last chunks come next."""
        ticket = self._tickets.get(number)
        if ticket is None:
            return False
        self._pending += self._end(ticket, "cancelled")
        return True

    @property
    def busy(self) -> bool:
        """There is something left for `step`."""
        return bool(self._tickets or self._pending)

    @torch.no_grad()
    def step(self) -> list[Chunk]:
        """Let in, prefill, and decode one token of every running answer; returns what was written."""
        chunks, self._pending = self._pending, []
        for ticket in [ticket for ticket in self._tickets.values() if ticket.late]:
            chunks += self._end(ticket, "deadline")
        admitted = self._scheduler.admit([answer.ticket for answer in self._running.answers])
        for group in self._groups(admitted):
            chunks += self._prefill(group)
        if self._running.answers:
            chunks += self._decode_step()
        return chunks

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer all of them; completions come in the order in which they end.

        Requests are taken from the iterable as they are needed. One that cannot be answered comes back
        with its ``error``; the others go on.
        """
        left = iter(requests)
        more = True
        while more or self.busy:
            while more and len(self._scheduler.waiting) < 2 * self._scheduler.most_rows:
                request = next(left, None)
                more = request is not None
                if request is None:
                    break
                try:
                    self.submit(request)
                except SkipVisionError as error:
                    yield _refused(request, error)
            for chunk in self.step():
                if chunk.completion is not None:
                    yield chunk.completion

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Load a saved adapter, the first or another; requests can ask for it from now on.

        It runs under the SkipConfig that it was trained with, whatever the others run under; but their
        summaries must be of one number K, or 0.

        Raises:
            AdapterError: as `load_adapter`; also if there is no LoRA in it.
            ConfigError: the name is taken, or its SkipConfig is not possible here.
        """
        if name in self._adapters.names:
            raise ConfigError(f"there is an adapter {name!r} already: remove_adapter() it first")
        config = read_adapter(Path(folder))["skip"] or SkipConfig.full()
        with self._attachment.growing(config):
            self._adapters.add(name, Path(folder))
        self._trained[name] = config

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; raises `ConfigError` if requests are running under it."""
        self._adapters.check(name)
        if name in (BASE, self._adapters.default):
            raise ConfigError(f"{name!r} is what this engine was made with; it stays")
        busy = sum(ticket.adapter == name for ticket in self._tickets.values())
        if busy:
            raise ConfigError(f"{busy} requests run under adapter {name!r}: wait for them, or cancel them")
        self._adapters.remove(name)
        del self._trained[name]
        self._prefixes.clear()

    @property
    def adapters(self) -> list[str]:
        """Names that requests can ask for; "__base__" is the model without any."""
        return self._adapters.names

    @property
    def configs(self) -> dict[str, SkipConfig]:
        """The SkipConfig that requests of each adapter run under."""
        return {name: self._config_of(name) for name in self._adapters.names}

    @property
    def ending(self) -> frozenset[int]:
        """Tokens that end any answer."""
        return self._ending

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self._base.get_output_embeddings().weight.shape[0])

    def statistics(self) -> Statistics:
        """What the engine is doing, and has done."""
        counters, running = self._counters, self._running
        return Statistics(
            running=len(running.answers),
            waiting=len(self._scheduler.waiting),
            waiting_answers=sum(len(ticket.answers) for ticket in self._scheduler.waiting),
            max_sequences=self._scheduler.most_rows,
            kv_bytes_used=running.entries * self._token_bytes,
            kv_bytes_reserved=running.reserved * self._token_bytes,
            kv_bytes_budget=self._scheduler.capacity * self._token_bytes,
            prefix_bytes=self._prefixes.nbytes,
            prefix_hits=self._prefixes.hits,
            prefix_misses=self._prefixes.misses,
            requests=dict(counters.requests),
            prefill_tokens=counters.prefill_tokens,
            prefill_seconds=counters.prefill_seconds,
            decode_tokens=counters.decode_tokens,
            decode_seconds=counters.decode_seconds,
            decode_steps=counters.decode_steps,
            visual_total=counters.visual_total,
            visual_retained=counters.visual_retained,
            visual_skipped=counters.visual_skipped,
            visual_cached=counters.visual_cached,
            time_to_first_token=median_and_tail(counters.first_tokens),
            time_per_output_token=median_and_tail(counters.between_tokens),
        )

    def close(self) -> None:
        """Give the model back: what the engine attached is detached; what still ran is forgotten."""
        self._running.clear()
        self._tickets.clear()
        self._scheduler.waiting.clear()
        self._prefixes.clear()
        self._adapters.clear()
        if self._detaches:
            self._attachment.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ prefill

    def _config_of(self, adapter: str) -> SkipConfig:
        """The base model's, or the one that an adapter was trained with."""
        return self._trained.get(adapter, self._config)

    def _decode(self, ids: Sequence[int]) -> str:
        if self._processor is None:
            return ""
        return str(self._processor.decode(list(ids), skip_special_tokens=True))

    def _groups(self, admitted: Sequence[Ticket]) -> Iterator[list[Ticket]]:
        """What is prefilled in one call each: of one SkipConfig and adapter, prefixes all known or none."""
        groups: dict[Any, list[Ticket]] = {}
        begun: set[Any] = set()
        for ticket in admitted:
            key = self._key(ticket)
            known = key is not None and (key in begun or key in self._prefixes)
            alone = ticket.number if self._family.one_by_one else None
            groups.setdefault((known, ticket.config, ticket.adapter, alone), []).append(ticket)
            begun.add(key)
        # The new ones first: among them may be the prefixes of the others.
        yield from (group for (known, *_), group in groups.items() if not known)
        yield from (group for (known, *_), group in groups.items() if known)

    def _key(self, ticket: Ticket) -> Any:
        """What a ticket's prefix is held under; None if it has none that could be."""
        # What is behind the images decides over them: the prompt's last token asks.
        whole = self._family.whole_prompt or ticket.config.select == "attention"
        if not self._prefixes.limit or not ticket.prompt.prefix_length or whole:
            return None
        return ticket.prompt.prefix_digest, ticket.config, ticket.adapter

    def _prefill(self, group: list[Ticket]) -> list[Chunk]:
        begin = time.monotonic()
        for ticket in group:
            ticket.began = ticket.began or begin
        try:
            filled = self._prefilled(group)
        except torch.AcceleratorError:
            raise  # nothing works any more on a device that has failed
        except Exception as error:
            if len(group) > 1:
                # Whose fault it is shows when each is alone.
                return [chunk for ticket in group for chunk in self._prefill([ticket])]
            return self._fail(group[0], error)
        for ticket, visual, entries in zip(
            group, filled.visual, filled.stay.sum(dim=1).tolist(), strict=True
        ):
            ticket.visual, ticket.entries = visual, entries
        answers = [answer for ticket in group for answer in ticket.answers]
        all_answers = [*self._running.answers, *answers]
        if not self._scheduler.fits(len(all_answers), max(answer.ticket.reserved for answer in all_answers)):
            return self._put_back(group)
        row = [row for row, ticket in enumerate(group) for _ in ticket.answers]
        self._running.add(answers, row, filled)
        for ticket in group:
            ticket.prompt.inputs.clear()  # pixels are no longer needed
        self._counters.prefilled(group, time.monotonic() - begin)
        return self._write(answers, filled.logits[row])

    def _prefilled(self, group: list[Ticket]) -> Prefilled:
        first, prompts = group[0], [ticket.prompt for ticket in group]
        self._adapters.activate(first.adapter)
        keys = [self._key(ticket) for ticket in group]
        held = [self._prefixes.find(key) for key in keys if key is not None]
        known = [prefix for prefix in held if prefix is not None]
        if len(known) == len(group):
            for ticket in group:
                ticket.prefix_hit = True
            return self._prefiller.behind(known, prompts)
        filled = self._prefiller.whole(prompts, first.config)
        for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            if key is not None:
                self._prefixes.put(key, filled.prefix(row, prompt.prefix_length))
        return filled

    def _put_back(self, group: list[Ticket]) -> list[Chunk]:
        """More stays of their images than the prompts told; what is planned now is exact."""
        hopeless: list[Chunk] = []
        for ticket in reversed(group):
            try:
                self._scheduler.refuse(ticket)
                self._scheduler.waiting.appendleft(ticket)
            except ResourceError as error:
                hopeless += self._fail(ticket, error)
        return hopeless

    # ------------------------------------------------------------------------------------- decode

    def _decode_step(self) -> list[Chunk]:
        begin, answers = time.monotonic(), list(self._running.answers)
        logits = self._running.decode()
        chunks = self._write(answers, logits)
        self._counters.decoded(len(answers), time.monotonic() - begin)
        return chunks

    def _write(self, answers: Sequence[Answer], logits: torch.Tensor) -> list[Chunk]:
        """The next token of each answer, from its (R, V) logits; what ends leaves its row."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        adjusted, errors = self._adjusted(answers, logits)
        draws = torch.tensor([answer.draw() for answer in answers])
        taken = _taken([answer.sampling for answer in answers], logits, adjusted, draws)
        chunks, now = [], time.monotonic()
        for row, answer in enumerate(answers):
            ticket = answer.ticket
            if ticket.error is not None:
                continue  # with another of its answers
            token = errors.get(row, taken[row])
            if isinstance(token, Exception):
                chunks += self._fail(ticket, token)
                continue
            ticket.first_token = ticket.first_token or now
            try:
                chunk = answer.write(*token, self._ending)
            except Exception as error:
                chunks += self._fail(ticket, error)
                continue
            if answer.finish_reason is not None:
                self._running.remove(answer)
                chunk = self._closing(chunk, ticket)
            chunks.append(chunk)
        return chunks

    def _adjusted(
        self, answers: Sequence[Answer], logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, Exception]]:
        """(R, V) logits by each answer's settings, and for rows that have none what is wrong."""
        errors: dict[int, Exception] = {}
        for row in (logits.isnan() | logits.isposinf()).any(dim=1).nonzero().squeeze(1).tolist():
            errors[row] = GenerationError(
                "the model's logits are not numbers: an image or prompt makes it overflow, or its weights "
                "are damaged. Other requests go on; try this one with dtype float32"
            )
        changed = logits.clone()
        if self._suppressed:
            changed[:, self._suppressed] = -torch.inf
        for row, answer in enumerate(answers):
            if row in errors:
                continue
            try:
                penalty = answer.sampling.repetition_penalty
                if penalty != 1:
                    seen = sorted({*answer.ticket.prompt.ids, *answer.ids})
                    there = torch.tensor(seen, device=logits.device)
                    changed[row] = penalise(changed[row], there, penalty)
                if answer.adjust is not None:
                    changed[row] = answer.adjust(answer.ids, changed[row])
            except torch.AcceleratorError:
                raise
            except Exception as error:
                errors[row] = error
        wrong = (changed.isnan() | changed.isposinf()).any(dim=1) | changed.isneginf().all(dim=1)
        for row in wrong.nonzero().squeeze(1).tolist():
            errors.setdefault(
                row,
                GenerationError(
                    "no token can be taken: repetition_penalty, suppressed tokens and adjust leave no logit "
                    "that is a number, or make one infinite"
                ),
            )
            changed[row] = 0
        return changed, errors

    # ---------------------------------------------------------------------------------------- ends

    def _fail(self, ticket: Ticket, error: Exception) -> list[Chunk]:
        ticket.error = error
        return self._end(ticket, "error")

    def _end(self, ticket: Ticket, reason: FinishReason) -> list[Chunk]:
        """End a request wherever it is, and free its place."""
        if ticket in self._scheduler.waiting:
            self._scheduler.waiting.remove(ticket)
        chunks = []
        for answer in ticket.answers:
            if answer.finish_reason is None:
                if answer in self._running.answers:
                    self._running.remove(answer, erase=reason == "error")
                chunks.append(self._closing(answer.end(reason), ticket))
        return chunks

    def _closing(self, chunk: Chunk, ticket: Ticket) -> Chunk:
        """The last chunk of an answer; of a request, if its other answers have ended."""
        if not ticket.finished:
            return chunk
        del self._tickets[ticket.number]
        completion = ticket.completion(self._token_bytes)
        self._counters.completed(completion)
        return replace(chunk, completion=completion)


def _base_of(model: nn.Module) -> PreTrainedModel:
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None or not base.can_generate():
        raise UnsupportedModelError(
            f"{type(model if base is None else base).__name__} cannot generate: load the model with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    return base


def _generation_settings(model: PreTrainedModel) -> tuple[frozenset[int], list[int]]:
    """The tokens that end an answer, and those that are never taken."""
    settings: Any = model.generation_config
    ending = settings.eos_token_id
    ending = [] if ending is None else [ending] if isinstance(ending, int) else list(ending)
    return frozenset(ending), list(settings.suppress_tokens or [])


def _taken(
    settings: Sequence[Sampling], logits: torch.Tensor, adjusted: torch.Tensor, draws: torch.Tensor
) -> list[tuple[int, TokenLogprob | None] | Exception]:
    """Each row's token and what is reported of it; or what went wrong with that row.

    Args:
        settings: of each row.
        logits: (R, V) of the model.
        adjusted: (R, V) by each row's settings.
        draws: (R,) uniform in [0, 1).
    """
    try:
        tokens = choose(adjusted, settings, draws).tolist()
        reports = report(logits, tokens, [setting.logprobs for setting in settings])
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if len(settings) == 1:
            return [error]
        # Whose fault it is shows when each is alone.
        alone = [slice(row, row + 1) for row in range(len(settings))]
        return [_taken(settings[row], logits[row], adjusted[row], draws[row])[0] for row in alone]
    return list(zip(tokens, reports, strict=True))


def _refused(request: Request, error: Exception) -> Completion:
    return Completion(request, -1, (), Usage(), Timing(0.0, None, 0.0), error)


def _check_numbers(**numbers: tuple[int, int]) -> None:
    wrong = [
        f"{name}={value!r}: a whole number of {least} or more is expected"
        for name, (value, least) in numbers.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < least
    ]
    if wrong:
        raise ConfigError("Engine: " + "; ".join(wrong))
