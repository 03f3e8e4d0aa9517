"""Write tables of results as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Return a Markdown table without a final line break.

    Args:
        header: titles of the columns.
        rows: the cells of each row; a ``|`` in a cell becomes ``/``, because it would end the cell.
        left: indices of the columns that are aligned to the left; numbers are easier to read to the right.
    """
    rules = ["---" if column in left else "---:" for column in range(len(header))]
    return "\n".join(map(_line, [header, rules, *rows]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
