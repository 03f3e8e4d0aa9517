"""Memory of training steps: their activations, predicted and measured, and the peak of a process or GPU.

Activations are what the forward of a batch keeps for its backward. They are measured by the hooks that
autograd calls for each tensor it keeps, so the number means the same on CPUs and GPUs.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.data.collate import IGNORED, Batch
from pipelines.finetune.learner import Learner
from pipelines.shared.console import say
from pipelines.tracking.run import Tracker
from skipvision.cost.predict import predict_activations
from skipvision.errors import UnsupportedModelError


class Memory:
    """Predicts and reports the activations of one worker's batches.

    Attributes:
        predicted: bytes of the first batch's activations; None if they cannot be predicted.
    """

    def __init__(self, learner: Learner, tracker: Tracker | None) -> None:
        self.learner, self.tracker = learner, tracker
        self.predicted: int | None = None

    def predict(self, batches: Sequence[Batch]) -> None:
        """Print how much memory the first step will need. Its batch is the longest of the first epoch."""
        sizes = [predicted_activations(self.learner, batch) for batch in batches]
        known = [size for size in sizes if size is not None]
        if known:
            self.predicted = max(known)
            say(f"the activations of the first batch will take about {_text(self.predicted)}")

    def report(self) -> None:
        """Print how much memory the first step has needed."""
        say(f"the activations of the first batch take {_text(self.learner.activation_bytes)}")

    def result(self, done: int) -> dict[str, int]:
        """Return the bytes of the largest batch and those predicted; record them at step ``done``."""
        size = self.learner.activation_bytes
        memory = {"activation_bytes": size} if size else {}
        if self.predicted is not None:
            memory["activation_bytes_predicted"] = self.predicted
        if self.tracker is not None and memory:
            self.tracker.metrics({name: float(size) for name, size in memory.items()}, done)
        return memory


def predicted_activations(learner: Learner, batch: Batch) -> int | None:
    """Predict the bytes that the forward of a batch keeps for its backward; see `Learner.activation_bytes`.

    None with gradient checkpointing or ``eager`` attention, and for families without Skip-Vision.
    """
    if learner.config.training.gradient_checkpointing or learner.config.model.attention == "eager":
        return None
    try:
        return sum(_row_bytes(learner, learner.model, batch, row) for row in range(batch.rows))
    except UnsupportedModelError:
        return None


def _row_bytes(learner: Learner, model: Any, batch: Batch, row: int) -> int:
    """Predict the bytes of one row, with its padding."""
    visual = batch.inputs["input_ids"] == model.config.image_token_id
    each = int(visual.sum()) // max(batch.images, 1)
    own, answer = int(visual[row].sum()), int((batch.labels[row] != IGNORED).sum())
    return predict_activations(
        model.config,
        learner.config.skip,
        visual_tokens=[each] * round(own / each) if own else [],
        text_tokens=batch.labels.shape[1] - own - answer,
        new_tokens=answer,
        lora_rank=learner.config.lora.rank,
        dtype=learner.compute,
    )


def peak_memory(device: torch.device) -> int:
    """Return the peak use so far, in bytes: of GPU memory, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _text(size: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
