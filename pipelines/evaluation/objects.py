"""Objects that a caption names and the image does not have, and objects that it misses.

The objects of an image are those that its gold caption names. CHAIR (Rohrbach et al., arXiv 1809.02156) uses
reference captions too. Names are looked up in a list of words, without synonyms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pipelines.data.shapes_words import COLOURS, SHAPES
from pipelines.evaluation.items import OVERALL, Item
from pipelines.evaluation.measures import Gold, Measure, gold_of


@dataclass(frozen=True)
class ObjectWords:
    """The names of objects.

    Attributes:
        words: words or phrases; case does not matter, and a plural with s or es counts as its singular.
        repeated: whether each mention is another object; otherwise an object is named once or not.
        part: the slice whose items are captions.
    """

    words: tuple[str, ...]
    repeated: bool = False
    part: str = OVERALL

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted({word.casefold() for word in self.words}, key=len, reverse=True)
        return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})(?:e?s)?\b")

    def named_in(self, caption: str) -> Counter[str]:
        """Count the objects that a caption names."""
        named = Counter(self._pattern.findall(" ".join(caption.casefold().split())))
        return named if self.repeated else Counter(dict.fromkeys(named, 1))

    def measures(self, gold: Gold) -> list[Measure]:
        """Return the measures of captions: how many hallucinate or miss an object, and how many objects."""

        def hallucinated(item: Item) -> int | None:
            caption = gold_of(item, gold, self.part)
            return None if caption is None else self._only_in(item.prediction, caption)

        def missed(item: Item) -> int | None:
            caption = gold_of(item, gold, self.part)
            return None if caption is None else self._only_in(caption, item.prediction)

        def measure(name: str, title: str, count: Callable[[Item], int | None]) -> list[Measure]:
            share = Measure(f"captions_{name}", f"captions with {title} object, %", _any(count), self.part)
            number = f"{title.split()[-1]} objects per caption"
            return [share, Measure(f"{name}_objects", number, count, self.part, percent=False)]

        return [
            *measure("hallucinated", "a hallucinated", hallucinated),
            *measure("missed", "a missed", missed),
        ]

    def _only_in(self, caption: str, other: str) -> int:
        """Count the objects that only the first of two captions names."""
        return (self.named_in(caption) - self.named_in(other)).total()


def _any(count: Callable[[Item], int | None]) -> Callable[[Item], float | None]:
    def value(item: Item) -> float | None:
        number = count(item)
        return None if number is None else float(number > 0)

    return value


SHAPES_CAPTIONS = ObjectWords(
    tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    repeated=True,
    part="caption",
)
"""The objects of shapes captions, which name every object of the image by colour and shape.

An object with a wrong colour or shape counts as hallucinated, and the true one as missed. A wrong size or
place does not: such a caption fails the exact match alone. The number in the image is no object.
"""
