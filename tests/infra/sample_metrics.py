"""An hour of metrics as Ray's nodes export them: an endpoint that loses an engine, batch jobs, a fine-tune.

The values are invented so that every panel has data. `test_exported` compares names and labels with those of
work that really runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

BEGIN = datetime(2026, 12, 1, 9, tzinfo=UTC).timestamp()
SECONDS, STEP = 3600, 15
END = BEGIN + SECONDS
LOST = (2100, 2400)
"""Seconds in which one of two engines is gone."""
STAGES = {"media": 0.02, "prepare": 0.03, "rest": 0.008, "queue": 0.05, "prefill": 0.09, "decode": 0.9}
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Labels = tuple[tuple[str, str], ...]


class Samples:
    """Values of series over time, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, Labels], list[tuple[float, float]]] = defaultdict(list)
        self._sums: dict[tuple[str, Labels], float] = defaultdict(float)
        self.at = 0.0

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.values[f"ray_skipvision_{name}", tuple(labels.items())].append((BEGIN + self.at, value))

    def count(self, name: str, more: float, **labels: str) -> None:
        """Add to a counter. The rest of a fraction is kept."""
        key = (name, tuple(labels.items()))
        self._sums[key] += more
        self.gauge(name, math.floor(self._sums[key]), **labels)

    def observe(
        self, name: str, median: float, number: float, bounds: Sequence[float], **labels: str
    ) -> None:
        """Add values around a median to a histogram; one of twenty is over three times as large."""
        for bound in bounds:
            share = 0.5 * (1 + math.erf(math.log(bound / median) / (0.68 * math.sqrt(2))))
            self.count(f"{name}_bucket", share * number, **labels, le=f"{bound:g}")
        self.count(f"{name}_bucket", number, **labels, le="+Inf")
        self.count(f"{name}_count", number, **labels)
        key = (f"{name}_sum", tuple(labels.items()))
        self._sums[key] += 1.26 * median * number
        self.gauge(f"{name}_sum", self._sums[key], **labels)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the OpenMetrics text format."""
        for (name, labels), values in self.values.items():
            selector = ",".join(f'{label}="{value}"' for label, value in labels)
            yield from (f"{name}{{{selector}}} {value:.6g} {at:.0f}\n" for at, value in values)
        yield "# EOF\n"


def samples() -> Samples:
    """Return the metrics of the hour."""
    written = Samples()
    for at in range(0, SECONDS + 1, STEP):
        written.at = float(at)
        _endpoint(written, at)
        _captions(written, at, "captions", begin=300, rows=60_000, rate=22.0, missing=0.004)
        _captions(written, at, "mmbench-full", begin=1500, rows=8_000, rate=9.0, missing=0.0)
        _training(written, at)
    return written


def _endpoint(written: Samples, at: int) -> None:
    load = 7 + 4 * math.sin(2 * math.pi * at / 2700)
    lost = LOST[0] <= at < LOST[1]
    requests = load * STEP
    refused = requests * (0.12 if lost else 0.0)
    for status, number in (("200", requests - refused), ("404", requests * 0.01), ("429", refused)):
        written.count("http_requests_total", number, route="/v1/chat/completions", status=status)
    written.count("http_requests_total", 1, route="/healthz", status="200")
    written.count("errors_total", requests * 0.01, kind="model_not_found")
    if at >= LOST[0]:  # counters that appear with their first value
        died = 6 if at == LOST[0] else 0
        written.count("http_requests_total", died, route="/v1/chat/completions", status="503")
        written.count("errors_total", refused, kind="overloaded")
        written.count("errors_total", died, kind="engine_died")
        written.count("retries_total", 14 if at == LOST[0] else 0, model="llava")
        written.count("front_retries_total", 2 if at == LOST[0] else 0)
    slower = 4.0 if lost else 1 + 0.04 * load
    for stage, median in STAGES.items():
        longer = slower**2 if stage == "queue" else slower if stage in ("prefill", "decode") else 1.0
        written.observe(
            "stage_seconds", median * longer, requests - refused, _SECONDS, model="llava", stage=stage
        )
    written.observe("first_token_seconds", 0.2 * slower, requests - refused, _SECONDS, model="llava")
    written.observe("output_token_seconds", 0.014 * slower, requests - refused, _TOKEN_SECONDS, model="llava")
    written.count("visual_tokens_saved_total", 432 * (requests - refused), model="llava")
    for replica in ("a1b2", "c3d4"):
        if replica == "c3d4" and lost:
            continue
        share = load if lost else load / 2
        _engine(written, at, replica, share)


def _engine(written: Samples, at: int, replica: str, load: float) -> None:
    running, budget = min(64.0, 9.5 * load), 16 * 2**30
    used = running * 118 * 2**20
    visual = 576 * 3.5 * max(at, 1)
    gauges = {
        "running": round(running),
        "waiting": round(max(0.0, 9.5 * load - 64) * 1.5),
        "max_sequences": 64,
        "kv_bytes_used": used,
        "kv_bytes_reserved": min(budget, used * 1.35),
        "kv_bytes_budget": budget,
        "visual_total": visual,
        "visual_retained": visual / 4,
        "visual_skipped": visual / 4,
        "visual_cached": visual / 4,
    }
    for name, value in gauges.items():
        written.gauge(f"engine_{name}", value, model="llava", replica=replica)


def _captions(
    written: Samples, at: int, job: str, *, begin: int, rows: int, rate: float, missing: float
) -> None:
    """A job whose rate rises while its engines start, and whose gauges leave with it."""
    seconds = at - begin
    done = max(0.0, rate * (seconds - 60 * (1 - math.exp(-seconds / 60))))
    if seconds < 0 or done > rows:
        return
    written.gauge("batch_rows", rows, job_name=job)
    written.gauge("batch_rows_done", math.floor(done), job_name=job)
    if done:
        mean = done / seconds
        written.gauge("batch_rows_per_second", mean, job_name=job)
        written.gauge("batch_seconds_left", (rows - done) / mean, job_name=job)
    if missing * done >= 1:
        for kind, share in (("missing_image", 0.7), ("unreadable_image", 0.3)):
            written.gauge("batch_error_rows", math.floor(missing * done * share), job_name=job, kind=kind)


def _training(written: Samples, at: int) -> None:
    """A run that loses a worker at 40 minutes, and continues from its last checkpoint."""
    seconds, step_seconds, steps = at - 120, 3.1, 1200
    if seconds < 0:
        return
    lost = 2400
    done = int(seconds / step_seconds) if at < lost else 700 + max(0, int((at - lost - 90) / step_seconds))
    if lost <= at < lost + 90 or done > steps:
        return
    wobble = math.sin(at * 0.7) + math.sin(at * 1.9)
    written.gauge("training_steps", steps, job_name="llava-7b")
    written.gauge("training_steps_done", done, job_name="llava-7b")
    if done:
        written.gauge(
            "training_loss", 0.62 + 1.1 * math.exp(-done / 170) + 0.02 * wobble, job_name="llava-7b"
        )
        written.gauge("training_step_seconds", step_seconds + 0.12 * wobble, job_name="llava-7b")
        written.gauge("training_images_per_second", 64 / (step_seconds + 0.12 * wobble), job_name="llava-7b")
