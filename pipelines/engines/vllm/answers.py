"""Convert vLLM's output to this library's chunks and completion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipelines.engines.vllm.prompts import Rendered
from skipvision.config import SkipConfig
from skipvision.engine import Choice, Chunk, Completion, Request, Sampling, Timing, TokenLogprob, Usage
from skipvision.engine.requests import FinishReason
from skipvision.engine.streams import TextStream

Decode = Callable[[Sequence[int]], str]

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
    "abort": "cancelled",
}
"""vLLM's finish reasons, and the library's."""


class Answers:
    """The answers to one request while vLLM generates them.

    Their texts are decoded as those of the library's engine are.

    Args:
        number: id of the request.
        request: as submitted.
        rendered: its prompt.
        config: SkipConfig that it runs under.
        decode: token ids to text.
        entry_bytes: bytes of one token in the KV cache.

    Attributes:
        expired: whether the deadline has passed, so that vLLM was to abort the request.
        ended: whether vLLM has ended the request.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        rendered: Rendered,
        config: SkipConfig,
        decode: Decode,
        entry_bytes: int,
    ) -> None:
        self.expired = self.ended = False
        self._number, self._request, self._rendered = number, request, rendered
        self._config, self._entry_bytes = config, entry_bytes
        self._choices = [_Growing(index, request.sampling, decode) for index in range(request.sampling.n)]

    @property
    def inputs(self) -> dict[str, Any]:
        """vLLM's form of the prompt."""
        return self._rendered.inputs

    @property
    def begun(self) -> bool:
        """Whether a token has been generated."""
        return any(choice.ids for choice in self._choices)

    def add(self, output: Any) -> list[Chunk]:
        """Add what vLLM generated since the last call; the last chunk of all has the completion."""
        chunks = [self._chunk(one) for one in output.outputs]
        if output.finished:
            self.ended = True
            done = self._completion(output)
            last = chunks.pop() if chunks else Chunk(self._number, 0, "", ())
            chunks.append(replace(last, completion=done))
        return chunks

    def _chunk(self, output: Any) -> Chunk:
        reason = output.finish_reason
        found = None if reason is None else _REASONS.get(reason, "error")
        if found == "cancelled" and self.expired:
            found = "deadline"
        choice = self._choices[output.index]
        text, logprobs = choice.add(output, found)
        return Chunk(self._number, output.index, text, tuple(output.token_ids), logprobs, found)

    def _completion(self, output: Any) -> Completion:
        return Completion(
            request=self._request,
            id=self._number,
            choices=tuple(choice.choice() for choice in self._choices),
            usage=self._usage(output),
            timing=self._timing(output.metrics),
        )

    def _timing(self, times: Any) -> Timing:
        """Return the times of a request; those of vLLM are by the clock of another process."""
        total = time.monotonic() - self._rendered.submitted
        if times is None or not times.scheduled_ts:
            return Timing(total, None, total)
        if not times.first_token_ts:
            return Timing(0.0, None, total)
        queued = max(total - (times.last_token_ts - times.scheduled_ts), 0.0)
        return Timing(queued, queued + times.first_token_ts - times.scheduled_ts, total)

    def _usage(self, output: Any) -> Usage:
        """Count tokens as callers do: prompts as long as without pruning."""
        rendered, config = self._rendered, self._config
        total, kept, cached = rendered.visual_total, rendered.visual_kept, output.num_cached_tokens or 0
        return Usage(
            prompt_tokens=len(rendered) - kept + total,
            completion_tokens=sum(len(choice.ids) for choice in self._choices),
            visual_total=total,
            visual_retained=sum(config.counts(image.total).retained for image in rendered.images),
            visual_cached=kept,
            kv_bytes=len(rendered) * self._entry_bytes,
            prefix_hit=0 < rendered.images_end <= cached,
        )


class _Growing:
    """One answer while it is generated."""

    def __init__(self, index: int, sampling: Sampling, decode: Decode) -> None:
        self.index, self.ids = index, list[int]()
        self._sampling, self._stream = sampling, TextStream(decode, sampling.stop)
        self._logprobs: list[TokenLogprob] = []
        self._reason: FinishReason = "cancelled"

    def add(self, output: Any, reason: FinishReason | None) -> tuple[str, tuple[TokenLogprob, ...] | None]:
        """Add tokens; returns the text that is now certain, and the log probabilities if requested."""
        new = list(output.token_ids)
        self.ids += new
        # A token that ends the answer has no text. After a stop text, the reason is that text.
        ended = reason == "stop" and not isinstance(output.stop_reason, str)
        words = new[:-1] if ended else new
        text = self._stream.push(*words) if words else ""
        if reason is not None:
            text += self._stream.finish()
            self._reason = reason
        if self._sampling.logprobs is None:
            return text, None
        found = tuple(
            _logprob(token, entries, self._sampling.logprobs)
            for token, entries in zip(new, output.logprobs or (), strict=False)
        )
        self._logprobs += found
        return text, found

    def choice(self) -> Choice:
        """Return the answer as generated so far."""
        logprobs = None if self._sampling.logprobs is None else tuple(self._logprobs)
        return Choice(self.index, self._stream.text, tuple(self.ids), self._reason, logprobs)


def _logprob(token: int, entries: dict[int, Any], count: int) -> TokenLogprob:
    likeliest = sorted(entries.items(), key=lambda entry: -entry[1].logprob)[:count]
    top = tuple((other, float(entry.logprob)) for other, entry in likeliest)
    return TokenLogprob(token, float(entries[token].logprob), top)
