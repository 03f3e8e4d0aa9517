"""Cache of prompt prefixes: the same images after the same tokens, under the same SkipConfig and adapter.

Selection does not depend on the question, so the KV cache of a prompt up to its last image does not either.
The cache holds skipped tokens too: the tokens of the question attend to them once, before they leave.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from skipvision.engine.prefiller import Prefix


class PrefixCache:
    """Least-recently-used cache of prefixes.

    Args:
        limit: max bytes of keys and values; 0 disables the cache.

    Attributes:
        nbytes: bytes in use.
        hits, misses: results of `find` so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self.hits = self.misses = 0
        self._held: OrderedDict[Hashable, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def find(self, key: Hashable) -> Prefix | None:
        """Return the prefix of this key, or None; counts a hit or a miss."""
        prefix = self._held.get(key)
        if prefix is None:
            self.misses += 1
        else:
            self.hits += 1
            self._held.move_to_end(key)
        return prefix

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Add a prefix, and evict the least recently used ones. Ignores a prefix larger than the limit."""
        if prefix.nbytes > self.limit:
            return
        self.drop(key)
        self._held[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def drop(self, key: Hashable) -> None:
        """Remove the prefix of this key, if present."""
        old = self._held.pop(key, None)
        if old is not None:
            self.nbytes -= old.nbytes

    def clear(self) -> None:
        """Remove all prefixes, but keep the counts of hits and misses."""
        self._held.clear()
        self.nbytes = 0
