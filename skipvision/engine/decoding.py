"""The decode step: run the model on all rows, choose each row's next token, and append it."""

from __future__ import annotations

import time
from collections import abc
from math import inf
from typing import Any, cast

import torch

from skipvision.engine.finishing import Finisher
from skipvision.engine.model import ModelFacts
from skipvision.engine.requests import Chunk, Sampling, TokenLogprob
from skipvision.engine.running import Running
from skipvision.engine.sampling import choose, penalise, report
from skipvision.engine.sequences import Sequence
from skipvision.engine.statistics import Counters
from skipvision.errors import GenerationError

Token = tuple[int, TokenLogprob | None]

_NO_NUMBERS = (
    "the model's logits are NaN or infinite: an image or prompt makes it overflow, or its weights are "
    "damaged. Other requests continue; try this one with dtype float32"
)
_NO_CANDIDATE = (
    "no token can be chosen: repetition_penalty, suppressed tokens and adjust exclude every token, or make a "
    "logit NaN or infinite"
)


class DecodeStage:
    """Decodes one token for every running sequence.

    A row that fails ends its own request; the other rows continue. If a call of the model fails, its
    sequences are decoded one by one to find those that cause it.

    Args:
        running: the sequences with a row.
        finisher: ends sequences and requests.
        counters: count tokens and seconds.
        facts: the model's special tokens.
    """

    def __init__(self, running: Running, finisher: Finisher, counters: Counters, facts: ModelFacts) -> None:
        self._running, self._finisher, self._counters = running, finisher, counters
        self._generation = facts.generation

    def step(self) -> list[Chunk]:
        """Decode one token for every running sequence."""
        begin, rows = time.monotonic(), len(self._running.sequences)
        chunks = [chunk for batch in self._running.batches() for chunk in self._decode(batch)]
        self._counters.count_decode(rows, time.monotonic() - begin)
        return chunks

    def _decode(self, batch: list[Sequence]) -> list[Chunk]:
        batch = [sequence for sequence in batch if sequence.group.error is None]
        if not batch:
            return []
        try:
            logits = self._running.decode(batch)
        except torch.AcceleratorError:
            raise  # a failed device cannot run the other requests either
        except Exception as error:
            if len(batch) > 1:
                return [chunk for sequence in batch for chunk in self._decode([sequence])]
            return self._finisher.fail(batch[0].group, error)
        return self.append_tokens(batch, logits)

    def append_tokens(self, sequences: abc.Sequence[Sequence], logits: torch.Tensor) -> list[Chunk]:
        """Choose the next token of each sequence from its (R, V) logits; finished ones leave their row."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        adjusted, errors = self._adjust(sequences, logits)
        draws = torch.tensor([s.draw() if s.sampling.temperature > 0 else 0.0 for s in sequences])
        if self._generation.allows_invalid_logits:
            logits = logits.nan_to_num()
        settings = [_drawing(sequence) for sequence in sequences]
        tokens = _choose_tokens(settings, logits, adjusted, draws)
        chunks, now = [], time.monotonic()
        for row, sequence in enumerate(sequences):
            group = sequence.group
            if group.error is not None:
                continue  # failed with another sequence of its group
            token = errors.get(row, tokens[row])
            if isinstance(token, Exception):
                chunks += self._finisher.fail(group, token)
                continue
            group.first_token = group.first_token or now
            try:
                chunk = sequence.append(*token, self._generation.eos_token_ids)
            except Exception as error:
                chunks += self._finisher.fail(group, error)
                continue
            if sequence.finish_reason is not None:
                chunk = self._finisher.retire(sequence, chunk)
            chunks.append(chunk)
        return chunks

    def _adjust(
        self, sequences: abc.Sequence[Sequence], logits: torch.Tensor
    ) -> tuple[torch.Tensor, dict[int, Exception]]:
        """Apply the settings of model and request to (R, V) logits; returns errors by row, too.

        A pass over the logits of a large vocabulary takes long, so they are only copied if a setting changes
        them.
        """
        highest = _highest(logits)
        allowed = self._generation.allows_invalid_logits
        invalid = [] if allowed else [row for row, value in enumerate(highest) if not value < inf]
        errors: dict[int, Exception] = {row: GenerationError(_NO_NUMBERS) for row in invalid}
        adjusted = logits
        changed = self._changed(sequences, logits.device, errors)
        # `generate` ignores ids outside the vocabulary, too.
        suppressed = [
            token for token in self._generation.suppressed_token_ids if 0 <= token < logits.shape[1]
        ]
        if suppressed or changed:
            adjusted = logits.clone()
            if suppressed:
                adjusted[:, suppressed] = -inf
            for row in changed:
                try:
                    self._adjust_row(sequences[row], logits[row], adjusted[row])
                except torch.AcceleratorError:
                    raise
                except Exception as error:
                    errors[row] = error
            highest = _highest(adjusted)
        failed = [row for row, value in enumerate(highest) if not -inf < value < inf]
        if failed:
            adjusted = adjusted.clone()
            for row in failed:
                errors.setdefault(row, GenerationError(_NO_CANDIDATE))
                adjusted[row] = 0
        return adjusted, errors

    def _changed(
        self, sequences: abc.Sequence[Sequence], device: torch.device, errors: dict[int, Exception]
    ) -> list[int]:
        """Return the rows without an error whose own settings change the logits; new errors are added."""
        changed = []
        for row, sequence in enumerate(sequences):
            if row in errors:
                continue
            sampling = sequence.sampling
            try:
                if not sequence.ids:
                    sequence.processors = self._generation.processors(
                        sampling, sequence.group.prompt.ids, sequence.adjust, device
                    )
            except torch.AcceleratorError:
                raise
            except Exception as error:
                errors[row] = error
                continue
            penalised = sampling.repetition_penalty not in (None, 1)
            if penalised or sequence.processors is not None or sequence.adjust is not None:
                changed.append(row)
        return changed

    def _adjust_row(self, sequence: Sequence, logits: torch.Tensor, adjusted: torch.Tensor) -> None:
        """Change the (V,) adjusted logits, without suppressed tokens so far, in place."""
        prompt, sampling = sequence.group.prompt.ids, sequence.sampling
        if sequence.processors is not None:
            ids: Any = torch.tensor([[*prompt, *sequence.ids]], device=logits.device)
            adjusted.copy_(sequence.processors(ids, cast(Any, logits[None]))[0])
            return
        penalty = sampling.repetition_penalty
        if penalty not in (None, 1):
            seen = torch.tensor(sorted({*prompt, *sequence.ids}), device=logits.device)
            adjusted.copy_(penalise(adjusted, seen, penalty))
        if sequence.adjust is not None:
            adjusted.copy_(sequence.adjust(sequence.ids, adjusted))


def _drawing(sequence: Sequence) -> Sampling:
    """Return how a token is chosen from adjusted logits. Processors have done all but drawing."""
    if sequence.processors is None or sequence.sampling.temperature == 0:
        return sequence.sampling
    return sequence.sampling.model_copy(update={"temperature": 1.0, "top_k": 0, "top_p": 1.0})


def _highest(logits: torch.Tensor) -> list[float]:
    """Return the largest logit of each row of (R, V): NaN for a row with one, −inf if each is excluded."""
    highest: list[float] = logits.amax(dim=1).tolist()
    return highest


def _choose_tokens(
    settings: abc.Sequence[Sampling], logits: torch.Tensor, adjusted: torch.Tensor, draws: torch.Tensor
) -> list[Token | Exception]:
    """Choose each row's token and report its log probability, or return the row's error.

    Args:
        settings: settings of each row's request.
        logits: (R, V) of the model.
        adjusted: (R, V) after penalties and constraints.
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
        # Repeat row by row to find the one that fails.
        alone = [slice(row, row + 1) for row in range(len(settings))]
        return [_choose_tokens(settings[row], logits[row], adjusted[row], draws[row])[0] for row in alone]
    return list(zip(tokens, reports, strict=True))
