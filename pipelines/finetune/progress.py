"""Speed and remaining time of a training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.finetune.learner import StepStats
from pipelines.shared.console import duration


@dataclass
class Progress:
    """Times and losses of the steps, without validation and checkpoints. They continue after a restart."""

    steps: int
    step_seconds: list[float] = field(default_factory=list)
    last_loss: float = float("nan")
    last_parts: Mapping[str, float] = field(default_factory=dict)
    _mark: float = 0.0
    _session: float = 0.0
    _first: int = -1

    def start(self, done: int) -> None:
        """Start the clock of the next step; ``done`` steps are complete."""
        self._mark = time.monotonic()
        if self._first < 0:
            self._session, self._first = self._mark, done

    def finish(self, stats: StepStats) -> float:
        """Return the seconds of the step, including the wait for its images."""
        seconds = time.monotonic() - self._mark
        self.step_seconds.append(round(seconds, 4))
        if stats.learnt_tokens:
            self.last_loss, self.last_parts = stats.loss, {**self.last_parts, **stats.parts}
        return seconds

    def line(self, done: int, stats: StepStats) -> str:
        """Return a line of progress. The line of the last step has no remaining time."""
        rate = stats.images / max(self.step_seconds[-1], 1e-4)
        parts = ", ".join(
            f"{name.removesuffix('_loss')} {part:.4f}" for name, part in self.last_parts.items()
        )
        loss = f"loss {self.last_loss:.4f}" + (f" ({parts})" if parts else "")
        line = f"step {done}/{self.steps}  {loss}  {rate:.1f} images/s"
        if done == self.steps:
            return line
        left = (time.monotonic() - self._session) / (done - self._first) * (self.steps - done)
        return f"{line}  {duration(max(left, 1.0))} left"

    def summary(self) -> dict[str, Any]:
        """Return steps, loss and times for the run's result."""
        return {
            "steps": self.steps,
            "loss": self.last_loss,
            **self.last_parts,
            "training_seconds": round(sum(self.step_seconds), 2),
            "seconds_per_step": round(statistics.median(self.step_seconds), 4) if self.step_seconds else None,
        }
