"""Attention masks of a reduced sequence, for decoders that need more than a 2-D padding mask.

A decoder needs more for four reasons: layers that see only a window or a chunk, image tokens that attend to
each other both ways, training calls in which answers must not see skipped tokens, and merged tokens that
weigh as much as the tokens in them. Distances are taken between the tokens' indices in the caller's sequence,
so a window covers the same text as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvision._compat import attention_implementation
from skipvision.anatomy.attention import reads_padding_alone
from skipvision.anatomy.checks import FEED_FORWARD_KINDS
from skipvision.errors import ConfigError
from skipvision.plan import TokenPlan

FULL = "full_attention"
_SLIDING = "sliding_attention"
_CHUNKED = "chunked_attention"
_REFERENCE = "reference_sliding_attention"
"""Every token sees all of the first call, and a window of later tokens."""
_INDEXED = ("indexed_attention", "minimax_m3_sparse")
"""Kinds of layers that choose what to attend to among all earlier tokens."""
_RECURRENT = ("linear_attention", "conv")
"""Kinds of layers that take a 2-D padding mask."""

Given = torch.Tensor | dict[str, torch.Tensor | None] | None
"""A decoder's attention_mask: (B, S), (B, 1, L, S), one of the latter per kind of layer, or None."""


@dataclass(frozen=True)
class Sight:
    """The attention range of each kind of layer of one decoder.

    Attributes:
        kinds: the kinds of the decoder's layers that mix tokens, by the names of transformers'
            ``layer_types``, such as "full_attention", "sliding_attention" or "linear_attention"; sorted, each
            once.
        by_kind: the decoder takes a dictionary of masks, one per kind.
        reach: window or chunk length of a kind, in tokens.
        implementation: "sdpa" (boolean masks), "eager" (added masks), or one without masks per query.
        own_masks: attention makes its masks itself, by a 2-D padding mask.
    """

    kinds: tuple[str, ...]
    by_kind: bool
    reach: dict[str, int]
    implementation: str | None
    own_masks: bool = False

    @classmethod
    def of(cls, decoder: nn.Module) -> Sight:
        """Read it from the decoder's config."""
        config: Any = decoder.config
        window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        types = [t for t in getattr(config, "layer_types", None) or () if t not in FEED_FORWARD_KINDS]
        kinds = sorted(set(types)) if types else [_SLIDING if window else FULL]
        reach = {
            kind: size for kind, size in ((_SLIDING, window), (_REFERENCE, window), (_CHUNKED, chunk)) if size
        }
        return cls(
            tuple(kind if kind in reach else FULL for kind in kinds) if not types else tuple(kinds),
            bool(types),
            reach,
            attention_implementation(config),
            any(reads_padding_alone(layer) for layer in getattr(decoder, "layers", ())),
        )

    @property
    def unlimited(self) -> bool:
        """Whether every layer sees all earlier tokens, so that a 2-D mask suffices."""
        return not {*self.kinds} - {FULL, *_INDEXED, *_RECURRENT}

    @property
    def takes_masks(self) -> bool:
        """Whether attention takes a mask per query."""
        return self.implementation in ("sdpa", "eager") and not self.own_masks

    def check_masks(self) -> None:
        """Raise `ConfigError` if attention takes no mask per query."""
        if self.own_masks:
            raise ConfigError(
                "the decoder's attention makes its masks itself, from padding alone, so generated tokens "
                "cannot be kept from seeing skipped ones: train with skip_kv=False, or with skipped=0"
            )
        if not self.takes_masks:
            raise ConfigError(
                f"attn_implementation {self.implementation!r} takes no mask per query, which this call "
                "needs: load the model with attn_implementation='sdpa' or 'eager'"
            )

    @property
    def attending(self) -> tuple[str, ...]:
        """The kinds of layers that take a mask per query."""
        return tuple(kind for kind in self.kinds if kind not in _RECURRENT)

    def write(
        self,
        seen: dict[str, torch.Tensor],
        as_dict: bool,
        dtype: torch.dtype,
        real: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> Given:
        """Return the masks in the form that the decoder takes.

        Args:
            seen: (B, Q, K) booleans for each kind of attention layer.
            as_dict: the decoder takes a dictionary.
            dtype: of the hidden states.
            real: (B, Q) tokens that are not padding, for recurrent layers; None = all.
            sizes: (B, K) tokens that each key holds, whose log is added to its scores; None = one each.
        """
        masks: dict[str, torch.Tensor | None] = {
            kind: self._written(allowed, dtype, sizes) for kind, allowed in seen.items()
        }
        if not as_dict:
            return next(iter(masks.values()))
        return {**masks, **{kind: real for kind in self.kinds if kind in _RECURRENT}}

    def _written(self, seen: torch.Tensor, dtype: torch.dtype, sizes: torch.Tensor | None) -> torch.Tensor:
        seen = seen[:, None]
        # A softmax needs an entry in each row: a query that sees nothing is padding, and may see anything.
        seen = seen | ~seen.any(dim=-1, keepdim=True)
        if sizes is not None:
            wide = sizes.clamp(min=1).to(torch.promote_types(dtype, torch.float32))
            return wide.log().to(dtype)[:, None, None].masked_fill(~seen, torch.finfo(dtype).min)
        if self.implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def within_reach(
        self, kind: str, queries: torch.Tensor, keys: torch.Tensor, first: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, Q, K) keys that a kind of layer can see, by (B, Q) and (B, K) indices in the caller's rows.

        ``first`` (B,) are the tokens that each row was fed in the first call; None = all.
        """
        if kind not in self.reach or (kind == _REFERENCE and first is None):
            return torch.ones(1, 1, 1, dtype=torch.bool, device=keys.device)
        reach, queries, keys = self.reach[kind], queries[:, :, None], keys[:, None, :]
        if kind == _REFERENCE and first is not None:
            return (queries - keys < reach) | (keys < first[:, None, None])
        return queries - keys < reach if kind == _SLIDING else queries // reach == keys // reach


def token_indices(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) index of each token among the real tokens of its row; meaningless at padding."""
    return mask.long().cumsum(dim=1) - 1


def is_per_query(given: Given) -> bool:
    """Return whether a mask differs by query, instead of marking padding alone."""
    if isinstance(given, dict):
        written = [mask for mask in given.values() if mask is not None]
        return not written or any(mask.ndim == 4 for mask in written)
    return given is not None and given.ndim == 4


def prefill_mask(
    sight: Sight,
    plan: TokenPlan,
    given: Given,
    caller_index: torch.Tensor,
    earlier: torch.Tensor,
    earlier_index: torch.Tensor,
    dtype: torch.dtype,
    decoded: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> Given:
    """Return the decoder's mask for the reduced sequence.

    Args:
        sight: of the decoder.
        plan: the reduction.
        given: the decoder's mask for the caller's sequence.
        caller_index: (B, T) `token_indices` of the caller's tokens, counted from the first token of the row's
            cache.
        earlier: (B, C) real entries of the cache.
        earlier_index: (B, C) their indices among all tokens that their row was fed.
        dtype: of the hidden states.
        decoded: (B, T) generated tokens, which do not see tokens that leave the cache.
        first: (B,) tokens of the cache's first call, as in `Sight.within_reach`.
        sizes: (B, C + L) tokens that each entry and token holds; None = one each.

    Raises:
        ConfigError: the attention implementation takes no mask per query, but one is needed.
    """
    needed = decoded is not None or sizes is not None or is_per_query(given)
    if not needed and (sight.unlimited or not sight.takes_masks):
        return torch.cat([earlier, plan.attention_mask], dim=1)
    sight.check_masks()
    source = plan.position_source.clamp(min=0)
    token_index = torch.take_along_dim(caller_index, source, dim=1)
    order = torch.arange(source.shape[1], device=source.device)
    before = order[:, None] >= order
    seen = {}
    for kind in sight.attending if sight.by_kind or isinstance(given, dict) else sight.attending[:1]:
        mask = given.get(kind) if isinstance(given, dict) else given
        if mask is not None and mask.ndim == 4 and kind != _REFERENCE:
            own = _reduced(mask[..., -caller_index.shape[1] :], source, before)
        else:
            own = before & sight.within_reach(kind, token_index, token_index, first)
        own = own & plan.attention_mask[:, None, :]
        if decoded is not None:
            generated = torch.take_along_dim(decoded, plan.source.clamp(min=0), dim=1) & (plan.source >= 0)
            own = own & ~(generated[:, :, None] & ~plan.cache_mask[:, None, :])
        old = sight.within_reach(kind, token_index, earlier_index, first) & earlier[:, None, :]
        seen[kind] = torch.cat([old.expand(-1, own.shape[1], -1), own], dim=2)
    return sight.write(seen, sight.by_kind or isinstance(given, dict), dtype, plan.attention_mask, sizes)


def _reduced(given: torch.Tensor, source: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """(B, L, L) which reduced tokens see each other, by a mask (B, 1, T, T) over the caller's sequence.

    A token sees an earlier token if the mask allows this pair in either order. It sees a later token only if
    the mask allows the pair in both orders, as within an image that is attended to both ways.
    """
    allowed = given if given.dtype == torch.bool else given == 0
    allowed = allowed[:, 0].expand(len(source), -1, -1)
    rows = torch.take_along_dim(allowed, source[:, :, None], dim=1)
    pairs = torch.take_along_dim(rows, source[:, None, :], dim=2)
    apart = source[:, :, None] != source[:, None, :]
    both = pairs & pairs.mT & apart
    return torch.where(before, pairs | pairs.mT, both)


def decode_mask(
    sight: Sight,
    given: Given,
    mask: torch.Tensor,
    token_index: torch.Tensor,
    new: int,
    dtype: torch.dtype,
    first: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
) -> Given:
    """Return the decoder's mask for ``new`` tokens after a pruned cache.

    Args:
        sight: of the decoder.
        given: the decoder's mask for the caller's sequence.
        mask: (B, C + new) real entries of the cache, and of the new tokens.
        token_index: (B, C + new) their indices in the caller's rows.
        new: tokens of this call.
        dtype: of the hidden states.
        first: (B,) tokens of the cache's first call, as in `Sight.within_reach`.
        sizes: (B, C + new) tokens that each entry and token holds; None = one each.
    """
    if sizes is None and not is_per_query(given) and (sight.unlimited or not sight.takes_masks):
        return mask
    entries = mask.shape[1]
    order = torch.arange(entries, device=mask.device)
    before = order[entries - new :, None] >= order
    seen = {
        kind: before
        & mask[:, None, :]
        & sight.within_reach(kind, token_index[:, entries - new :], token_index, first)
        for kind in (sight.attending if sight.by_kind or isinstance(given, dict) else sight.attending[:1])
    }
    real = mask[:, entries - new :] if new > 1 else None
    return sight.write(seen, sight.by_kind or isinstance(given, dict), dtype, real, sizes)


def later_masks(
    decoder: Any,
    after: int,
    given: Given,
    columns: torch.Tensor,
    real: torch.Tensor,
    queries: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor | None]:
    """Return the mask of each layer after one layer, which lack some tokens and their entries.

    Args:
        decoder: its config names the kind of each layer.
        after: the last layer that lacks none.
        given: the decoder's mask, for all tokens.
        columns: (B, K) indices of the entries and tokens that are left, the tokens of this call last.
        real: (B, K) False at padding.
        queries: (B, Q) indices of this call's tokens that are left, among this call's tokens.
        dtype: of the hidden states.
    """
    sight, number = Sight.of(decoder), len(decoder.layers) - after - 1
    if not is_per_query(given):
        return [_later_mask(sight, real, queries.shape[1], dtype)] * number
    masks = given if isinstance(given, dict) else dict.fromkeys(sight.attending, given)
    cut = {kind: _cut(mask, columns, real, queries) for kind, mask in masks.items() if mask is not None}
    kinds = getattr(decoder.config, "layer_types", None) if isinstance(given, dict) else None
    return [cut[kind] for kind in kinds[after + 1 :]] if kinds else [next(iter(cut.values()))] * number


def _later_mask(sight: Sight, real: torch.Tensor, new: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Let each token see all earlier ones; None where attention does so without a mask."""
    entries = real.shape[1]
    if sight.implementation == "sdpa" and new in (1, entries) and bool(real.all()):
        return None
    order = torch.arange(entries, device=real.device)
    seen = (order[entries - new :, None] >= order) & real[:, None]
    mask = sight.write({FULL: seen}, False, dtype)
    return mask if isinstance(mask, torch.Tensor) else None


def _cut(
    mask: torch.Tensor, columns: torch.Tensor, real: torch.Tensor, queries: torch.Tensor
) -> torch.Tensor:
    """(B, 1, Q, K) of a mask per query, boolean or added."""
    rows, heads = len(columns), mask.shape[1]
    mask = mask.expand(rows, -1, -1, -1)
    mask = mask.gather(2, queries[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None].expand(-1, heads, mask.shape[2], -1))
    hidden = ~real[:, None, None]
    if mask.dtype != torch.bool:
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    mask = mask & ~hidden
    return mask | ~mask.any(dim=-1, keepdim=True)
