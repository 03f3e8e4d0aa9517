"""Drop: after one decoder layer, no visual token but the summaries is left.

The later layers run on the shorter sequence, so their KV caches never hold the other tokens. A `DroppedCall`
travels with the decoder's call, as a keyword, to a hook of each layer. The first of these layers gets the
hidden states of the tokens that are left; each of them gets their positions, and a mask for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skipvision.errors import UnsupportedModelError
from skipvision.plan import PLAN_KEYWORD, Drop, pick

DROP_KEYWORD = "skip_vision_drop"
"""Name under which a `DroppedCall` travels through the decoder's keyword arguments."""

_MASK, _HIDDEN = "attention_mask", "hidden_states"


@dataclass(frozen=True, eq=False)
class DroppedCall:
    """The layers of one call of the decoder that lack some tokens.

    Attributes:
        after: the last layer that lacks none.
        masks: the attention mask of each layer after it.
        drop: the tokens that are left of this call; None = all, but the layers' caches lack earlier tokens.
        length: L, tokens of this call in the layers before.
    """

    after: int
    masks: Sequence[torch.Tensor | None]
    drop: Drop | None = None
    length: int = 0

    def at_layer(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a layer: a later one takes the tokens that are left."""
        if number <= self.after:
            return args, kwargs
        if _MASK not in kwargs:
            raise UnsupportedModelError(
                f"layer {number} of the decoder takes no keyword {_MASK}, so drop_after cannot replace it: "
                "set drop_after to null"
            )
        mask = self.masks[number - self.after - 1]
        if self.drop is None:
            return args, {**kwargs, _MASK: mask}
        hidden = args[0] if args else kwargs[_HIDDEN]
        if number == self.after + 1:
            hidden = pick(hidden, self.drop.index)
        rest = tuple(self._left(value) for value in args[1:])
        given = {name: self._left(value) for name, value in kwargs.items() if name not in (_MASK, _HIDDEN)}
        given |= {_MASK: mask, PLAN_KEYWORD: self.drop.plan}
        return ((hidden, *rest), given) if args else ((), {_HIDDEN: hidden, **given})

    def _left(self, value: Any) -> Any:
        """Take the tokens that are left from a tensor (…, B or 1, L, …), or from those in a tuple or list."""
        if isinstance(value, tuple | list):
            return type(value)(self._left(one) for one in value)
        if not isinstance(value, torch.Tensor) or self.drop is None:
            return value
        rows = len(self.drop.index)
        for axis in range(min(2, value.ndim - 1)):
            if value.shape[axis] in (1, rows) and value.shape[axis + 1] == self.length:
                row = torch.arange(rows, device=value.device)[:, None]
                shape = [*value.shape]
                shape[axis] = rows
                whole, index = value.expand(shape), self.drop.index
                return whole[row, index] if axis == 0 else whole[:, row, index]
        return value
