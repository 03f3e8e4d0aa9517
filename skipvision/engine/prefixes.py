"""Prefixes that were computed before: the same images behind the same tokens, under the same plan.

Selection does not look at the question (METHOD), so what a prompt up to its last image leaves in the KV
cache does not depend on what follows. Skipped tokens are held too: the question must see them once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from skipvision.engine.prefill import Prefix


class PrefixCache:
    """The prefixes used last, within a limit.

    Args:
        limit: bytes of keys and values; 0 = hold nothing.

    Attributes:
        nbytes: held now.
        hits, misses: answers of `find` so far.
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
        """The prefix put under this key, if it is still held."""
        prefix = self._held.get(key)
        if prefix is None:
            self.misses += 1
        else:
            self.hits += 1
            self._held.move_to_end(key)
        return prefix

    def put(self, key: Hashable, prefix: Prefix) -> None:
        """Hold a prefix; those not used for longest go. One larger than the limit is not held."""
        if prefix.nbytes > self.limit:
            return
        self.drop(key)
        self._held[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

    def drop(self, key: Hashable) -> None:
        """Hold it no longer."""
        old = self._held.pop(key, None)
        if old is not None:
            self.nbytes -= old.nbytes

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self.nbytes = 0
