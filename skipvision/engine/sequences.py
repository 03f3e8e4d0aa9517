"""The state of one request, and of each answer that is generated for it."""

from __future__ import annotations

import time
from collections import abc

import torch
from transformers import LogitsProcessorList

from skipvision.config import SkipConfig
from skipvision.engine.prefiller import Visual
from skipvision.engine.prompts import Prompt
from skipvision.engine.requests import (
    Choice,
    Chunk,
    Completion,
    FinishReason,
    Request,
    Sampling,
    Timing,
    TokenLogprob,
    Usage,
)
from skipvision.engine.streams import TextStream

_GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ ÷ the golden ratio: spreads the seeds of neighbouring choices far apart."""


class SequenceGroup:
    """One request from submission to completion, with a sequence for each of its ``n`` answers.

    Args:
        number: the engine's id of the request.
        request: as submitted.
        prompt: the prepared prompt.
        config: SkipConfig that the request runs under.
        adapter: adapter that the request runs under.
        sampling: settings of its decoding, complete with those of the model.
        decode: token ids to text.

    Attributes:
        entries: KV cache entries that the prompt keeps: planned before prefill, exact afterwards.
        absent_bytes: bytes of those that layers after ``drop_after`` lack.
        sequences: one for each of ``n``.
        visual: token counts, known after prefill.
        prefix_hit: whether the prompt's prefix came from the cache.
        error: why the request failed.
        submitted, began, first_token: times of submission, start of prefill and first token, by
            `time.monotonic`.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        prompt: Prompt,
        config: SkipConfig,
        adapter: str,
        sampling: Sampling,
        decode: abc.Callable[[abc.Sequence[int]], str],
    ) -> None:
        self.number, self.request, self.prompt = number, request, prompt
        self.config, self.adapter, self.sampling = config, adapter, sampling
        self.entries, self.absent_bytes = prompt.planned_entries(config), 0
        self.sequences = [Sequence(self, index, decode) for index in range(sampling.n)]
        self.visual, self.prefix_hit = Visual(), False
        self.error: Exception | None = None
        self.submitted = time.monotonic()
        self.began: float | None = None
        self.first_token: float | None = None

    @property
    def reserved(self) -> int:
        """KV cache entries that each sequence may need."""
        # The last token is never fed to the model.
        return self.entries + self.sampling.max_new_tokens - 1

    @property
    def expired(self) -> bool:
        """Whether the request's deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and time.monotonic() - self.submitted >= deadline

    @property
    def finished(self) -> bool:
        """Whether all sequences have finished."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def completion(self, entry_bytes: int) -> Completion:
        """Build the completion.

        Args:
            entry_bytes: bytes of one entry of the KV cache.
        """
        end, visual = time.monotonic(), self.visual
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=sum(len(sequence.ids) for sequence in self.sequences),
            visual_total=visual.total,
            visual_retained=visual.retained,
            visual_skipped=visual.skipped,
            visual_cached=visual.cached,
            kv_bytes=self.entries * entry_bytes - self.absent_bytes if self.began is not None else 0,
            prefix_hit=self.prefix_hit,
        )
        timing = Timing(
            queued=(self.began or end) - self.submitted,
            first_token=None if self.first_token is None else self.first_token - self.submitted,
            total=end - self.submitted,
        )
        choices = tuple(sequence.choice() for sequence in self.sequences)
        return Completion(self.request, self.number, choices, usage, timing, self.error)


class Sequence:
    """One answer while it is generated.

    Attributes:
        group: the request that it belongs to.
        index: its number among the request's answers.
        sampling: the request's settings, complete with those of the model.
        processors: what the model's settings do to its logits, created with its first token; None = nothing
            that ``sampling`` does not have.
        ids: generated tokens.
        logprobs: log probabilities of the tokens, if requested.
        finish_reason: None until it has finished.
        adjust: function that changes the logits of its next token, or None.
        length: entries in its row of the KV cache.
        drop_after: last layer with all of them; None = every layer has all.
        absent: entries that the layers after it lack.
        sized: whether attention counts some of its entries as several tokens.
        fed: tokens of prompt and answer that the model has read, as the caller counts them.
        first: tokens of the prompt.
        position: (A,) position of the newest token, on each of the model's position axes.
    """

    def __init__(
        self, group: SequenceGroup, index: int, decode: abc.Callable[[abc.Sequence[int]], str]
    ) -> None:
        self.group, self.index = group, index
        self.sampling = group.sampling
        self.processors: LogitsProcessorList | None = None
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.length = self.fed = self.first = self.absent = 0
        self.drop_after: int | None = None
        self.sized = False
        self.position: list[int] = []
        self._stream = TextStream(decode, self.sampling.stop)
        self.adjust = None if group.request.adjust is None else group.request.adjust()
        self._generator = torch.Generator()
        if self.sampling.seed is None:
            self._generator.seed()
        else:
            # Each choice draws differently; the first draws as with n=1.
            self._generator.manual_seed((self.sampling.seed + index * _GOLDEN) % 2**63)

    def draw(self) -> float:
        """Draw the random number in [0, 1) that chooses the next token."""
        return float(torch.rand((), generator=self._generator))

    def append(self, token: int, logprob: TokenLogprob | None, eos_token_ids: frozenset[int]) -> Chunk:
        """Add a token, and finish if it ends the answer; returns the new text."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        text = ""
        if token in eos_token_ids or token in self.sampling.stop_token_ids:
            text, self.finish_reason = self._stream.finish(), "stop"
        else:
            text = self._stream.push(token)
            if self._stream.stopped:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.sampling.max_new_tokens:
                text += self._stream.finish()
                self.finish_reason = "stop" if self._stream.stopped else "length"
        return Chunk(
            self.group.number,
            self.index,
            text,
            (token,),
            None if logprob is None else (logprob,),
            self.finish_reason,
        )

    def finish(self, reason: FinishReason) -> Chunk:
        """Finish before the answer's own end; returns the text that was held back."""
        # After an error, decoding these tokens may be what failed.
        text, self.finish_reason = "" if reason == "error" else self._stream.finish(), reason
        return Chunk(self.group.number, self.index, text, (), finish_reason=reason)

    def choice(self) -> Choice:
        """Return the answer as generated so far."""
        return Choice(
            self.index,
            self._stream.text,
            tuple(self.ids),
            self.finish_reason or "cancelled",
            None if self.sampling.logprobs is None else tuple(self.logprobs),
        )
