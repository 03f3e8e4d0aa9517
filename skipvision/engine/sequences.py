"""One request in the engine, and each of the answers that are written to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from skipvision.config import SkipConfig
from skipvision.engine.prefill import Visual
from skipvision.engine.prompts import Prompt
from skipvision.engine.requests import (
    Choice,
    Chunk,
    Completion,
    FinishReason,
    Request,
    Timing,
    TokenLogprob,
    Usage,
)
from skipvision.engine.streams import TextStream


class Ticket:
    """A request from submission to completion.

    Args:
        number: the engine's name for it.
        request: as submitted.
        prompt: prepared.
        config: that it runs under.
        adapter: that it runs under.
        decode: token ids to text.

    Attributes:
        entries: of the KV cache that its prompt keeps: planned, and after prefill as it is.
        answers: one for each of ``n``.
        visual: counts; known after prefill.
        began: when its prefill began.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        prompt: Prompt,
        config: SkipConfig,
        adapter: str,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.number, self.request, self.prompt = number, request, prompt
        self.config, self.adapter = config, adapter
        self.entries = prompt.planned_entries(config)
        self.answers = [Answer(self, index, decode) for index in range(request.sampling.n)]
        self.visual, self.prefix_hit, self.error = Visual(), False, None
        self.submitted = time.monotonic()
        self.began: float | None = None
        self.first_token: float | None = None

    error: Exception | None

    @property
    def reserved(self) -> int:
        """Entries of the KV cache that each of its answers may come to need."""
        # The last token is never fed back.
        return self.entries + self.request.sampling.max_new_tokens - 1

    @property
    def late(self) -> bool:
        """Its deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.submitted >= deadline

    @property
    def finished(self) -> bool:
        """All its answers are."""
        return all(answer.finish_reason is not None for answer in self.answers)

    def completion(self, token_bytes: int) -> Completion:
        """The end of it; ``token_bytes`` is what one entry of the KV cache takes."""
        end, visual = time.monotonic(), self.visual
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(len(answer.ids) for answer in self.answers),
            visual_total=visual.total,
            visual_retained=visual.retained,
            visual_skipped=visual.skipped,
            visual_cached=visual.cached,
            kv_bytes=self.entries * token_bytes if self.began is not None else 0,
            prefix_hit=self.prefix_hit,
        )
        timing = Timing(
            queued=(self.began or end) - self.submitted,
            first_token=None if self.first_token is None else self.first_token - self.submitted,
            total=end - self.submitted,
        )
        choices = tuple(answer.choice() for answer in self.answers)
        return Completion(self.request, self.number, choices, usage, timing, self.error)


class Answer:
    """One answer while it is written.

    Attributes:
        ids: written.
        logprobs: of each, if asked for.
        finish_reason: once it is finished.
        length: entries of the KV cache in its slot.
        adjust: changes the logits of its next token, or None.
        fed: tokens of its prompt and answer so far, as the caller counts them, without the newest.
        position: (A,) of the newest token, on each axis.
    """

    def __init__(self, ticket: Ticket, index: int, decode: Callable[[Sequence[int]], str]) -> None:
        self.ticket, self.index = ticket, index
        self.sampling = ticket.request.sampling
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.length = self.fed = 0
        self.position: list[int] = []
        self._stream = TextStream(decode, self.sampling.stop)
        self.adjust = None if ticket.request.adjust is None else ticket.request.adjust()
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            # Choices of one request differ; the first is what n=1 gives.
            self._generator.manual_seed((self.sampling.seed + index * _GOLDEN) % 2**63)

    def draw(self) -> float:
        """A number in [0, 1) for the next token."""
        return float(torch.rand((), generator=self._generator))

    def write(self, token: int, logprob: TokenLogprob | None, ending: frozenset[int]) -> Chunk:
        """Add a token; ``ending`` are the ids that end any answer."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        text = ""
        if token in ending or token in self.sampling.stop_token_ids:
            text, self.finish_reason = self._stream.finish(), "stop"
        else:
            text = self._stream.push(token)
            if self._stream.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.sampling.max_new_tokens:
                text += self._stream.finish()
                self.finish_reason = "stop" if self._stream.stopped else "length"
        return Chunk(
            self.ticket.number,
            self.index,
            text,
            (token,),
            None if logprob is None else (logprob,),
            self.finish_reason,
        )

    def end(self, reason: FinishReason) -> Chunk:
        """Write no more."""
        # After an error, it may be these tokens that cannot be read.
        text, self.finish_reason = "" if reason == "error" else self._stream.finish(), reason
        return Chunk(self.ticket.number, self.index, text, (), finish_reason=reason)

    def choice(self) -> Choice:
        """What has been written."""
        return Choice(
            self.index,
            self._stream.text,
            tuple(self.ids),
            self.finish_reason or "cancelled",
            None if self.sampling.logprobs is None else tuple(self.logprobs),
        )


_GOLDEN = 0x9E3779B97F4A7C15
"""Far apart seeds from near ones (2⁶⁴ ÷ the golden ratio)."""
