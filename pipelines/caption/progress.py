"""The progress of a captioning job, printed, recorded in MLflow and exported to Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from pipelines.caption.folder import Tally
from pipelines.cluster.metrics import JobGauges
from pipelines.shared.console import duration, say
from pipelines.tracking.run import Tracker

if TYPE_CHECKING:
    from pipelines.caption.stages import CaptionedBlock
    from skipvision.engine import Statistics

_REPORT_SECONDS = 5.0

_GAUGES = {
    "skipvision_batch_rows": "rows of the job",
    "skipvision_batch_rows_done": "rows that have a caption or an error, over all starts of the job",
    "skipvision_batch_rows_per_second": "rate since the first rows of this start",
    "skipvision_batch_seconds_left": "estimated time to the last row (s)",
    "skipvision_batch_error_rows": "error rows by kind, over all starts of the job",
}


class CaptionProgress:
    """Rows and errors so far, their rate, and the statistics of the engines.

    ``tally`` has the rows that have arrived, and ``written`` those in files.

    Args:
        name: name of the job.
        rows: number of rows of the job.
        before: rows captioned by earlier starts of the job.
        tracker: the job's MLflow run.
        seconds_before: seconds of earlier starts.
    """

    def __init__(self, name: str, rows: int, before: Tally, tracker: Tracker, seconds_before: float) -> None:
        self.rows, self.tracker = rows, tracker
        self.tally = Tally(before.rows, Counter(before.errors))
        self.written = before
        self._before, self._seconds_before = before.rows, seconds_before
        self._started = self._reported = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._last = self._started
        self._engines: dict[str, Statistics] = {}
        self._gauges = JobGauges(name, _GAUGES)
        self._errors = JobGauges(name, _GAUGES, "kind")

    def start(self) -> None:
        """Export the numbers of rows before the first block: a job that gets none is stuck."""
        self._export()

    @property
    def seconds(self) -> float:
        """Seconds of captioning up to the newest row, over all starts of the job."""
        return self._seconds_before + self._last - self._started

    @property
    def rate(self) -> float:
        """Rows per second of this start, from its first rows to its newest."""
        if self._first is None or self._last == self._first[0]:
            return self._since_start()
        return (self.tally.rows - self._first[1]) / (self._last - self._first[0])

    def add(self, block: CaptionedBlock) -> None:
        """Add the rows of a captioned block."""
        self._last = time.monotonic()
        self.tally.rows += len(block.captions)
        self.tally.errors.update(c.error_kind for c in block.captions.values() if c.error_kind)
        self._engines[block.engine] = block.statistics
        self._export()
        if self._first is None:  # no rate yet
            self._first, self._reported = (self._last, self.tally.rows), self._last
        elif self._last - self._reported >= _REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        """Print a line of progress and record the same values as metrics."""
        self._reported = time.monotonic()
        rate = self.rate
        left = duration((self.rows - self.tally.rows) / rate) if rate else "unknown time"
        errors = f"  {self.tally.failed:,} errors" if self.tally.failed else ""
        say(f"row {self.tally.rows:,}/{self.rows:,}{errors}  {rate:.1f} rows/s  {left} left")
        values = {
            "rows": float(self.tally.rows),
            "error_rows": float(self.tally.failed),
            "rows_per_second": rate,
        }
        self.tracker.metrics({**values, **self.engines()}, self.tally.rows)

    def _export(self) -> None:
        """Set the gauges, with each block: a slow job differs from a stuck one."""
        values = {
            "skipvision_batch_rows": float(self.rows),
            "skipvision_batch_rows_done": float(self.tally.rows),
        }
        if rate := self.rate:
            values["skipvision_batch_rows_per_second"] = rate
            values["skipvision_batch_seconds_left"] = (self.rows - self.tally.rows) / rate
        self._gauges.set(values)
        self._errors.set_by("skipvision_batch_error_rows", dict(self.tally.errors))

    def engines(self) -> dict[str, float]:
        """Return sums and means over the engines' statistics."""
        all_of = list(self._engines.values())
        if not all_of:
            return {}
        count = len(all_of)
        values = {
            "engine/running": float(sum(s.running for s in all_of)),
            "engine/waiting": float(sum(s.waiting for s in all_of)),
            "engine/kv_bytes_used": float(sum(s.kv_bytes_used for s in all_of)),
            "engine/decode_tokens_per_second": _ratio(
                sum(s.decode_tokens for s in all_of), sum(s.decode_seconds for s in all_of) / count
            ),
            # At best max_sequences.
            "engine/mean_running": _ratio(
                sum(s.decode_tokens for s in all_of), sum(s.decode_steps for s in all_of)
            ),
            "engine/prefix_hits": float(sum(s.prefix_hits for s in all_of)),
        }
        # vLLM does not report these seconds.
        if seconds := sum(s.prefill_seconds for s in all_of) / count:
            values["engine/prefill_tokens_per_second"] = sum(s.prefill_tokens for s in all_of) / seconds
        return values

    def _since_start(self) -> float:
        return _ratio(self.tally.rows - self._before, self._last - self._started)


def _ratio(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0
