"""How many rows of a job may be errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from skipvision.errors import DataError


class ErrorLimit:
    """At most a share of all rows, and never all of them."""

    def __init__(self, fraction: float, rows: int) -> None:
        self.fraction, self.rows = fraction, rows

    def check(self, errors: Counter[str], example: str = "") -> None:
        """Raise `DataError` if these, by kind, are more than allowed, whatever becomes of the other rows.

        Args:
            errors: rows with an error.
            example: one of them, for the message.
        """
        failed = errors.total()
        said = f" ({listed(errors)}){example and f'; {example}, for one'}"
        if self.rows and failed == self.rows:
            raise DataError(f"all {failed} rows are errors{said}: mend the inputs or the settings")
        if failed > self.fraction * self.rows:
            raise DataError(
                f"{failed} of {self.rows} rows are errors{said}, more than max_error_fraction = "
                f"{self.fraction:g}; mend the inputs, or raise it and run the job again"
            )


def listed(counts: Mapping[str, int]) -> str:
    """Counts as people read them."""
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())
