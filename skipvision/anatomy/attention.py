"""Attention that tokens receive in one layer, computed from the layer's own queries and keys.

They are intercepted where transformers passes them to its attention function, after projections, norms and
rotations. So layers of all families and attention implementations are read in the same way, and only the
rows of weights that are needed are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from skipvision._compat import looks_up_attention, submodules, with_attention_implementation
from skipvision.errors import UnsupportedModelError

_READING = "skip_vision_reading"
"""Name under which transformers looks up the function that reads instead of attending."""


@dataclass(frozen=True, eq=False)
class Attended:
    """Queries and keys of one call of an attention module.

    Attributes:
        query: (B, heads, Q, d).
        key: (B, groups, K, d); a group is shared by heads / groups query heads.
        mask: (B or 1, heads or 1, Q, K) booleans or addends; None if it does not differ by query.
        options: other arguments of the attention function: "scaling" (d^-½ by default), "softcap", and
            "sliding_window", the number of tokens that a query sees, up to its own.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    options: dict[str, Any]

    @torch.no_grad()
    def received(self, queries: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """(B, K) attention that each key receives, mean over heads and queries, in at least float32.

        Args:
            queries: (B, n) indices of the queries whose attention counts.
            seen: (B, K) keys that these may see, besides the limits of the mask.
        """
        rows, heads, _, width = self.query.shape
        groups, n = self.key.shape[1], queries.shape[1]
        selected = self._at(self.query, queries).reshape(rows, groups, -1, width)
        compared = (selected @ self.key.transpose(2, 3)).reshape(rows, heads, n, -1)
        compared = compared.to(torch.promote_types(compared.dtype, torch.float32))
        compared = compared * (self.options.get("scaling") or width**-0.5)
        if softcap := self.options.get("softcap"):
            compared = softcap * (compared / softcap).tanh()
        if window := self.options.get("sliding_window"):
            near = torch.arange(compared.shape[3], device=queries.device) > queries[..., None] - window
            compared = compared.masked_fill(~near[:, None], -torch.inf)
        if seen is not None:
            compared = compared.masked_fill(~seen[:, None, None], -torch.inf)
        if self.mask is not None:
            mask = self._at(self.mask.expand(rows, -1, -1, -1), queries)
            compared = (
                compared.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else compared + mask
            )
        return compared.softmax(dim=3).mean(dim=(1, 2))

    @staticmethod
    def _at(values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(B, h, Q, x) → (B, h, n, x)."""
        index = queries[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return values.gather(2, index)


@torch.no_grad()
def read(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended:
    """Call an attention module up to its attention function, and return queries and keys.

    Raises:
        UnsupportedModelError: the module does not pass queries and keys to transformers' attention function.
    """
    with _read_by(attention):
        try:
            attention.forward(*args, **kwargs)
        except _Read as found:
            return found.attended
    raise unreadable(attention)


def block_indexer(attention: nn.Module | None) -> nn.Module | None:
    """Return the module by which attention selects blocks of neighbouring entries, if it does.

    It counts a row's entries with the padding before them, so what it selects depends on the batch.
    """
    if attention is None:
        return None
    indexer = submodules(attention).get("indexer")
    return indexer if hasattr(indexer, "block_size") else None


def reads_padding_alone(layer: nn.Module) -> bool:
    """Return whether a decoder layer's attention masks what its indexer does not select, and no more.

    It takes no mask per query: causality and padding are the indexer's.
    """
    return hasattr(submodules(layer).get("self_attn"), "build_attention_mask_from_topk")


def check_readable(attention: nn.Module) -> None:
    """Raise the `UnsupportedModelError` of `read` if it is clear without a call."""
    if not looks_up_attention(attention):
        raise unreadable(attention)


def unreadable(attention: nn.Module) -> UnsupportedModelError:
    """Return the error about a module whose attention cannot be read."""
    return UnsupportedModelError(
        f"{type(attention).__name__} does not pass queries and keys to transformers' attention function: "
        "the attention of its tokens cannot be read. Choose another select",
        "attention that cannot be read",
    )


class _Read(Exception):
    """Ends an attention module's call once queries and keys are known."""

    def __init__(self, attended: Attended) -> None:
        super().__init__()
        self.attended = attended


def _raise_read(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: Any, attention_mask: Any, **options: Any
) -> None:
    per_query = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
    mask = _selected(module, query, key, attention_mask if per_query else None, options)
    raise _Read(Attended(query, key, mask, options))


def _selected(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """Return a mask that leaves each query only what its layer's indexer selects, if it has one.

    Decoders put the selection into the mask themselves for "eager" and "sdpa" alone.
    """
    keys, blocks = options.get("indices"), options.get("block_indices")
    if keys is None and blocks is None:
        return mask
    shape = (len(query), 1, query.shape[2], key.shape[2])
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[3] - shape[2])
    if keys is not None:
        chosen = torch.zeros(shape, dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, keys[:, None].long(), True)
        return (mask if mask.dtype == torch.bool else mask == 0) & chosen
    indexer: Any = module.indexer
    selected: torch.Tensor = indexer.build_block_mask(
        blocks, mask, key.shape[2], query.dtype, query.device, options.get("position_ids")
    )
    return selected


@contextmanager
def _read_by(attention: nn.Module) -> Iterator[None]:
    """Make the module alone, by a config of its own, look up the function that reads."""
    check_readable(attention)
    AttentionInterface.register(_READING, _raise_read)
    own: Any = attention.config
    attention.config = with_attention_implementation(own, _READING)
    try:
        yield
    finally:
        attention.config = own
