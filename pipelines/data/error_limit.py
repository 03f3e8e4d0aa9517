"""A limit on the share of error rows in a job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from skipvision.errors import DataError


class ErrorLimit:
    """Allows a share of all rows to be errors, but never all rows."""

    def __init__(self, fraction: float, rows: int) -> None:
        self.fraction, self.rows = fraction, rows

    def check(self, errors: Counter[str], example: str = "") -> None:
        """Raise `DataError` if there are too many errors.

        Args:
            errors: numbers of error rows so far, by kind.
            example: one of the errors, for the message.
        """
        failed = errors.total()
        kinds = f" ({listed(errors)}){example and f'; for example {example}'}"
        if self.rows and failed == self.rows:
            raise DataError(f"all {failed} rows are errors{kinds}: correct the inputs or the settings")
        if failed > self.fraction * self.rows:
            raise DataError(
                f"{failed} of {self.rows} rows are errors{kinds}, more than max_error_fraction = "
                f"{self.fraction:g}; correct the inputs, or raise the limit, and run the job again"
            )


def listed(counts: Mapping[str, int]) -> str:
    """Return counts as text: ``2 × missing image, 1 × prompt``."""
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items())
