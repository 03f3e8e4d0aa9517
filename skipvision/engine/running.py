"""The running sequences, the row of each in `Slots`, and the model call that decodes them all."""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from skipvision._compat import recompile_limit
from skipvision.drop import DroppedCall
from skipvision.engine.adapters import Adapters
from skipvision.engine.model import ModelFacts
from skipvision.engine.prefiller import Prefilled
from skipvision.engine.scheduler import Scheduler
from skipvision.engine.sequences import Sequence
from skipvision.engine.slots import Left, Slots, Step

_MAX_COMPILED_SHAPES = 64
"""Combinations of rows and length that are compiled; further ones run uncompiled."""


class Running:
    """Sequences that are being decoded; sequence i has row i of the slots.

    Args:
        facts: the model and its constants.
        adapters: activates the adapter of each call.
        scheduler: the arithmetic of rows and lengths.
        compiled: run decode steps through ``torch.compile``; a string names the backend.

    Attributes:
        sequences: in the order of their rows.
        slots: the KV cache.
    """

    def __init__(
        self, facts: ModelFacts, adapters: Adapters, scheduler: Scheduler, compiled: bool | str
    ) -> None:
        self._model: Any = facts.base
        self._sight, self._adapters, self._scheduler = facts.sight, adapters, scheduler
        backend = compiled if isinstance(compiled, str) else "inductor"
        self._compiled = torch.compile(self._model, dynamic=False, backend=backend) if compiled else None
        self._kinds = getattr(facts.text_config, "layer_types", None) or ()
        self.sequences: list[Sequence] = []
        self.slots = Slots(scheduler.capacity, scheduler.rows(scheduler.max_rows))

    @property
    def entries(self) -> int:
        """KV cache entries of all sequences."""
        return sum(sequence.length for sequence in self.sequences)

    @property
    def reserved(self) -> int:
        """KV cache entries that the rows in use can hold."""
        return self._scheduler.rows(len(self.sequences)) * self.slots.length

    def add(self, sequences: abc.Sequence[Sequence], source: abc.Sequence[int], filled: Prefilled) -> None:
        """Give new sequences a row each, and copy their prompts' entries into it.

        Args:
            sequences: N new sequences.
            source: for each of them, the row of ``filled`` with its prompt.
            filled: a prefilled batch.
        """
        index, lengths = filled.staying()
        fed, positions = filled.fed.tolist(), filled.next_position.T.tolist()
        for sequence, row in zip(sequences, source, strict=True):
            sequence.length, sequence.fed, sequence.position = lengths[row], fed[row], positions[row]
            sequence.first = fed[row]
        later = filled.staying_later()
        if later is not None:
            for sequence, row in zip(sequences, source, strict=True):
                sequence.absent = lengths[row] - later[3][row]
                sequence.drop_after = later[0] if sequence.absent else None
        self.slots.allocate(filled.layers, filled.states)
        self._make_room([*self.sequences, *sequences])
        rows = torch.tensor(source, device=index.device)
        ordinals = torch.take_along_dim(filled.ordinal, index, dim=1)
        left = None if later is None else Left(later[0], later[1][rows], later[2][rows])
        sizes = None
        if filled.sizes is not None:
            sizes = torch.take_along_dim(filled.sizes, index, dim=1)[rows]
            for sequence, sized in zip(sequences, (sizes > 1).any(dim=1).tolist(), strict=True):
                sequence.sized = sized
        self.slots.append(filled.layers, filled.states, rows, index[rows], ordinals[rows], left, sizes)
        self.sequences += sequences

    def remove(self, sequence: Sequence, erase: bool = False) -> None:
        """Free the row of a sequence; the last row moves there.

        Args:
            sequence: a running sequence.
            erase: overwrite the row. Required if it may hold NaN, which attention masks do not stop.
        """
        row = self.sequences.index(sequence)
        if erase:
            self.slots.erase(row)
        self.slots.remove(row)
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()

    def clear(self) -> None:
        """Drop all sequences and free their rows."""
        self.sequences.clear()
        self.slots.rows = 0

    def batches(self) -> list[list[Sequence]]:
        """Split the sequences by the call that decodes them: one, and one per adapter that decodes alone."""
        batches: dict[str, list[Sequence]] = {}
        for sequence in self.sequences:
            name = sequence.group.adapter
            batches.setdefault(name if self._adapters.decodes_alone(name) else "", []).append(sequence)
        return list(batches.values())

    def decode(self, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
        """Feed the newest token of sequences to the model; returns (R, V) logits of the next.

        After an error the sequences are as before, and can be decoded again.

        Args:
            sequences: all of them, or those of some rows, under adapters that can share a call.
        """
        device, whole = self._model.device, list(sequences) == self.sequences
        idle = self._scheduler.rows(len(sequences)) - len(sequences) if whole else 0

        def tensor(values: list[Any], filler: Any = 0) -> torch.Tensor:
            return torch.tensor(values + [filler] * idle, device=device)

        lengths = [sequence.length for sequence in sequences]
        dropping = sorted({s.drop_after for s in sequences if s.drop_after is not None})
        compiled = self._compiled is not None and whole and not dropping
        span = self.slots.length if compiled else self._scheduler.length(max(lengths) + 1)
        at, ordinals = tensor(lengths), tensor([sequence.fed for sequence in sequences])
        axes = len(sequences[0].position)
        positions = tensor([sequence.position for sequence in sequences], [0] * axes).T[..., None]
        rows = None if whole else torch.tensor(self._rows_of(sequences), device=device)
        self.slots.begin_step(at, ordinals, min(span, self.slots.length), rows)
        first = tensor([sequence.first for sequence in sequences])
        sized = any(sequence.sized for sequence in sequences)
        sizes = self.slots.sizes() if sized else None
        if dropping:
            absent = [tensor([s.absent if _lacks(s, after) else 0 for s in sequences]) for after in dropping]
            lacking = [tensor([_lacks(s, after) for s in sequences], False) for after in dropping]
            self._lack(dropping, absent, lacking, ordinals, first, sized)
        inputs = {
            "input_ids": tensor([[sequence.ids[-1]] for sequence in sequences], [0]),
            "attention_mask": self._mask(at, ordinals, self.slots.ordinals(), first, sizes),
            "position_ids": positions if axes > 1 else positions[0],
            "past_key_values": self.slots,
            "use_cache": True,
        }
        output = self._call(inputs, [sequence.group.adapter for sequence in sequences], idle, compiled)
        self.slots.end_step()
        logits: torch.Tensor = output.logits[: len(sequences), -1]
        for sequence in sequences:
            sequence.length += 1
            sequence.fed += 1
            sequence.position = [position + 1 for position in sequence.position]
        return logits

    def _rows_of(self, sequences: abc.Sequence[Sequence]) -> list[int]:
        rows = {sequence: row for row, sequence in enumerate(self.sequences)}
        return [rows[sequence] for sequence in sequences]

    def _call(self, inputs: dict[str, Any], names: list[str], idle: int, compiled: bool) -> Any:
        if len(set(names)) > 1:
            with self._adapters.by_row([*names, *names[:1] * idle]):
                return self._model(**inputs)
        self._adapters.activate(names[0])
        if self._compiled is None or not compiled:
            return self._model(**inputs)
        with recompile_limit(_MAX_COMPILED_SHAPES):
            return self._compiled(**inputs)

    def _lack(
        self,
        dropping: list[int],
        absent: list[torch.Tensor],
        lacking: list[torch.Tensor],
        ordinals: torch.Tensor,
        first: torch.Tensor,
        sized: bool,
    ) -> None:
        """Set what the layers after each of some layers read in this step, and their masks.

        Args:
            dropping: these layers, in order.
            absent: for each, (R,) entries that rows lack after it.
            lacking: for each, (R,) whether a row's entries after it are others than before.
            ordinals: (R,) index of the new tokens among the caller's.
            first: (R,) tokens of the prompts.
            sized: attention counts entries of some rows as several tokens.
        """
        slots, total = self.slots, len(self.slots.layers)
        slots.lack(
            [
                Step(after, slots.at - less, self._scheduler.length(int((slots.at - less).max()) + 1))
                for after, less in zip(dropping, absent, strict=True)
            ],
            lacking,
            ordinals,
        )
        masks: list[torch.Tensor | None] = []
        for number, step in enumerate(slots.steps):
            end = dropping[number + 1] if number + 1 < len(dropping) else total - 1
            keys = slots.later_ordinals(step, lacking[number])
            sizes = slots.later_sizes(step, lacking[number]) if sized else None
            mask = self._mask(step.at, ordinals, keys, first, sizes)
            kinds = self._kinds[step.after + 1 : end + 1] if isinstance(mask, dict) else None
            masks += [mask[kind] for kind in kinds] if kinds else [mask] * (end - step.after)
        slots.dropped = DroppedCall(dropping[0], masks)

    def _mask(
        self,
        lengths: torch.Tensor,
        ordinals: torch.Tensor,
        keys: torch.Tensor,
        first: torch.Tensor,
        sizes: torch.Tensor | None,
    ) -> Any:
        """Let each row's new token see the row's own entries, within the window of each layer.

        ``keys`` (R, span) are the entries' indices among the caller's tokens, and ``sizes`` (R, span) the
        tokens that attention counts each as; None = one each.
        """
        visible = torch.arange(keys.shape[1], device=keys.device) <= lengths[:, None]
        if not self._sight.takes_masks:
            return visible.long()
        kinds = self._sight.attending if self._sight.by_kind else self._sight.attending[:1]
        masks = {
            kind: visible[:, None] & self._sight.within_reach(kind, ordinals[:, None], keys, first)
            for kind in kinds
        }
        return self._sight.write(masks, self._sight.by_kind, self._model.dtype, sizes=sizes)

    def _make_room(self, sequences: abc.Sequence[Sequence]) -> None:
        """Change the length of rows if these sequences need longer rows, or more of them."""
        needed = self._scheduler.length(max(sequence.group.reserved for sequence in sequences))
        slots, rows = self.slots, self._scheduler.rows(len(sequences))
        if needed > slots.length or rows * slots.length > slots.capacity:
            slots.reshape(needed)


def _lacks(sequence: Sequence, after: int) -> bool:
    """Return whether the layers after one layer lack entries of a sequence."""
    return sequence.drop_after is not None and sequence.drop_after <= after
