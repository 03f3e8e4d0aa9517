"""The answers that are being written: their rows, and the decode step over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _dynamo as dynamo

from skipvision.anatomy.masks import Sight
from skipvision.engine.adapters import Adapters
from skipvision.engine.prefill import Prefilled
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import Answer
from skipvision.engine.slots import Slots

_COMPILED_SHAPES = 64
"""Numbers of rows times lengths that may be compiled; behind them the step runs as it is."""


class Running:
    """Rows of `Slots`, an answer each.

    Args:
        model: the model, without PEFT around it.
        adapters: of it.
        sight: of its decoder.
        scheduler: the arithmetic of rows and lengths.
        compiled: run decode steps through ``torch.compile``, with this backend or the usual one.

    Attributes:
        answers: in the order of their rows.
        slots: the rows.
    """

    def __init__(
        self, model: Any, adapters: Adapters, sight: Sight, scheduler: Scheduler, compiled: bool | str
    ) -> None:
        self._model, self._adapters, self._sight, self._scheduler = model, adapters, sight, scheduler
        backend = compiled if isinstance(compiled, str) else "inductor"
        self._compiled = torch.compile(model, dynamic=False, backend=backend) if compiled else None
        self.answers: list[Answer] = []
        self.slots = Slots(scheduler.capacity)

    @property
    def entries(self) -> int:
        """Of the KV cache, that all answers together have."""
        return sum(answer.length for answer in self.answers)

    @property
    def reserved(self) -> int:
        """Places of the rows in use."""
        return self._scheduler.rows(len(self.answers)) * self.slots.length

    def add(self, answers: Sequence[Answer], row: Sequence[int], filled: Prefilled) -> None:
        """Put answers into new rows, each behind the prompt in its ``row`` of a prefill."""
        index, lengths = filled.staying()
        fed, positions = filled.fed.tolist(), filled.next_position.T.tolist()
        for answer, source in zip(answers, row, strict=True):
            answer.length, answer.fed, answer.position = lengths[source], fed[source], positions[source]
        self.slots.allocate(filled.layers)
        self._make_room([*self.answers, *answers])
        at = torch.tensor(row, device=index.device)
        places = torch.take_along_dim(filled.place, index, dim=1)
        self.slots.append(filled.layers, at, index[at], places[at])
        self.answers += answers

    def remove(self, answer: Answer, erase: bool = False) -> None:
        """Free the row of an answer; the last row moves there. What is not a number must be erased."""
        row = self.answers.index(answer)
        if erase:
            self.slots.erase(row)
        self.slots.remove(row)
        self.answers[row] = self.answers[-1]
        self.answers.pop()

    def clear(self) -> None:
        """Free all rows."""
        self.answers.clear()
        self.slots.rows = 0

    def decode(self) -> torch.Tensor:
        """Feed the newest token of every answer; returns (R, V) logits of the next."""
        answers, device = self.answers, self._model.device
        idle = self._scheduler.rows(len(answers)) - len(answers)

        def tensor(values: list[Any], filler: Any = 0) -> torch.Tensor:
            return torch.tensor(values + [filler] * idle, device=device)

        lengths = [answer.length for answer in answers]
        span = self.slots.length if self._compiled is not None else self._scheduler.length(max(lengths) + 1)
        at, places = tensor(lengths), tensor([answer.fed for answer in answers])
        axes = len(answers[0].position)
        positions = tensor([answer.position for answer in answers], [0] * axes).T[..., None]
        self.slots.begin_step(at, places, min(span, self.slots.length))
        call = {
            "input_ids": tensor([[answer.ids[-1]] for answer in answers], [0]),
            "attention_mask": self._mask(at, places),
            "position_ids": positions if axes > 1 else positions[0],
            "past_key_values": self.slots,
            "use_cache": True,
        }
        logits: torch.Tensor = self._call(call, idle).logits[: len(answers), -1]
        for answer in answers:
            answer.length += 1
            answer.fed += 1
            answer.position = [position + 1 for position in answer.position]
        return logits

    def _call(self, call: dict[str, Any], idle: int) -> Any:
        names = [answer.ticket.adapter for answer in self.answers]
        if len(set(names)) > 1:
            return self._adapters.call([*names, *names[:1] * idle], **call)
        self._adapters.activate(names[0])
        if self._compiled is None:
            return self._model(**call)
        with dynamo.config.patch(recompile_limit=_COMPILED_SHAPES):
            return self._compiled(**call)  # type: ignore[no-untyped-call]

    def _mask(self, lengths: torch.Tensor, places: torch.Tensor) -> Any:
        """What each row's new token sees: its own entries, as far back as the layers look."""
        there = self.slots.places()
        seen = torch.arange(there.shape[1], device=there.device) <= lengths[:, None]
        if not self._sight.takes_masks:
            return seen.long()
        kinds = self._sight.kinds if self._sight.by_kind else self._sight.kinds[:1]
        masks = {
            kind: seen[:, None] & self._sight.within_reach(kind, places[:, None], there) for kind in kinds
        }
        return self._sight.write(masks, self._sight.by_kind, self._model.dtype)

    def _make_room(self, answers: Sequence[Answer]) -> None:
        """Make rows long enough for all, and short enough for as many."""
        needed = self._scheduler.length(max(answer.ticket.reserved for answer in answers))
        slots, rows = self.slots, self._scheduler.rows(len(answers))
        if needed > slots.length or rows * slots.length > slots.capacity:
            slots.reshape(needed)
