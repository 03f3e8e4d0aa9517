"""The training of one worker without Ray: the model, one optimiser step, one validation pass.

If ``torch.distributed`` runs, all workers compute the step together.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn

import skipvision as sv
from pipelines._compat import enable_checkpointing
from pipelines.data.collate import Batch
from pipelines.engines.loading import arithmetic
from pipelines.finetune.config import FinetuneConfig, TrainingSection
from pipelines.finetune.objective import Loss, Objective
from pipelines.finetune.on_policy import OnPolicy
from pipelines.finetune.teacher_cache import TeacherCache
from skipvision.cost.kept import KeptTensors
from skipvision.errors import ConfigError


def prepare(base: nn.Module, config: FinetuneConfig) -> nn.Module:
    """Apply LoRA and, if configured, Skip-Vision to the base model, whose own weights are frozen."""
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads a deprecated attribute of transformers.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = peft.get_peft_model(base, lora)
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.target_modules = {config.lora.target_modules}: {error}") from error
    if config.skip is not None:
        sv.attach(model, config.skip)
    if config.training.gradient_checkpointing:
        enable_checkpointing(model)
        # Only re-entrant checkpointing needs gradients at the embeddings. At the vision tower's embeddings
        # they would make it keep all activations for a backward pass that updates nothing.
        model.disable_input_require_grads()
    model.train()
    return model


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Stop PEFT from casting the inputs of LoRA to float32, for a model that only runs under autocast.

    Autocast casts them back to bfloat16: the values are the same, but every input of a linear layer is copied
    twice, and one copy is kept for the backward.
    """
    layers: Any = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False


def learning_rate(training: TrainingSection, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0): a linear rise, then half a cosine."""
    warm = int(steps * training.warmup)
    if step < warm:
        return training.learning_rate * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, steps - warm)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    floor = training.final_learning_rate
    return training.learning_rate * (floor + (1 - floor) * cosine)


@dataclass(frozen=True)
class StepStats:
    """One optimiser step of all workers: mean losses per learnt token, norm before clipping, inputs.

    ``parts`` are ``answers_loss`` and ``distill_loss`` if a teacher takes part; without ``answers_loss`` in a
    step whose answers the student wrote.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    learnt_tokens: int
    tokens: int
    images: int
    parts: Mapping[str, float] = field(default_factory=dict)


class Learner:
    """The trainable parameters of a model and their optimiser.

    Attributes:
        activation_bytes: the most that the forward of a batch has kept for its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FinetuneConfig,
        device: torch.device,
        cache: TeacherCache | None = None,
        on_policy: OnPolicy | None = None,
    ) -> None:
        self.model, self.config, self.device, self.cache = model, config, device, cache
        self.on_policy = on_policy
        self.activation_bytes = self._largest = 0
        self.compute = arithmetic(config.training.precision, device)
        if self.compute == torch.bfloat16:
            leave_casts_to_autocast(model)
        self.objective = Objective(config.training, config.distillation)
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if _workers() > 1:
            for parameter in self.trainable.values():
                distributed.broadcast(parameter.data, src=0)
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=0.0, weight_decay=config.training.weight_decay, fused=True
        )

    def step(self, micro_batches: Sequence[Batch], step: int, steps: int) -> StepStats:
        """Train on this worker's share of a global batch, which may be empty.

        The random state depends only on (seed, step, worker), so that a resumed run repeats it.
        """
        seed = np.random.SeedSequence([self.config.seed, step, _rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        totals = torch.zeros(6, dtype=torch.float64)
        own = self.on_policy if self.on_policy is not None and self.on_policy.applies(step) else None
        for batch in micro_batches:
            loss = self._measured_loss(batch, own)
            loss.total.backward()
            totals += torch.tensor([*loss.values(), batch.tokens, batch.images], dtype=torch.float64)
        loss_sum, answer_tokens, answers, distill, tokens, images = self._share(totals)
        training = self.config.training
        parameters = list(self.trainable.values())
        norm = float(nn.utils.clip_grad_norm_(parameters, training.max_grad_norm))
        if not math.isfinite(norm):
            raise sv.SkipVisionError(
                f"the gradient at step {step + 1} is {norm}: lower training.learning_rate, or set "
                "training.precision to float32, and run the job again with --resume_with_changes true: it "
                "resumes from the last checkpoint. If the error comes back, start again under another name"
            )
        rate = learning_rate(training, step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if answer_tokens:  # without any, momentum and weight decay would still move the weights
            self.optimizer.step()
        self.optimizer.zero_grad()
        parts = {"answers_loss": answers, "distill_loss": distill} if training.teaches else {}
        if own is not None:
            del parts["answers_loss"]  # of the student's own words: no measure of what the rows teach
        means = {name: total / max(answer_tokens, 1) for name, total in parts.items()}
        mean = loss_sum / max(answer_tokens, 1)
        return StepStats(mean, norm, rate, int(answer_tokens), int(tokens), int(images), means)

    def _measured_loss(self, batch: Batch, own: OnPolicy | None) -> Loss:
        """Return the loss of a batch. If no batch before was as large, measure what it keeps in memory."""
        if batch.labels.numel() <= self._largest:
            return self.loss(batch, self.cache, own)
        self._largest = batch.labels.numel()
        with KeptTensors(self.model) as kept:
            loss = self.loss(batch, self.cache, own)
        self.activation_bytes = max(self.activation_bytes, kept.bytes)
        return loss

    def loss(self, batch: Batch, cache: TeacherCache | None = None, own: OnPolicy | None = None) -> Loss:
        """Return the summed loss of a batch's learnt tokens; with ``own``, the model first writes answers."""
        batch = batch.to(self.device)
        with self.autocast():
            if own is not None:
                batch = own.rewrite(self.model, batch)
            return self.objective.loss(self.model, batch, cache, own_answers=own is not None)

    @torch.no_grad()
    def validation_losses(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return mean losses per token over all workers' batches; NaN if there are none.

        ``validation_loss`` is the cross-entropy whatever the objective is, so that runs can be compared.
        ``validation_distill_loss`` is the divergence from the teacher, if one takes part.
        """
        self.model.eval()
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            totals += torch.tensor(self.loss(batch).values(), dtype=torch.float64)
        self.model.train()
        _, learnt, answers, distill = self._summed(totals)
        losses = {"validation_loss": float(answers / learnt)}
        return (
            {**losses, "validation_distill_loss": float(distill / learnt)}
            if self.config.training.teaches
            else losses
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context of mixed precision, if the training uses it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16)

    def state(self) -> dict[str, Any]:
        """Return trainable weights and optimiser state for a checkpoint.

        Learning rate, order of rows and random state follow from the step.
        """
        return {
            "weights": {n: p.detach() for n, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore weights and optimiser from the result of `state`."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _share(self, totals: torch.Tensor) -> list[float]:
        """Give every worker the gradients of the mean loss over the whole batch; return summed ``totals``.

        This replaces DistributedDataParallel, for three reasons: a batch is weighted by its learnt tokens and
        not by worker; a worker may have no rows, or no image for the summary layer; and the trainable
        parameters are few enough for one all-reduce.
        """
        parameters = list(self.trainable.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        totals = self._summed(totals)
        flat = torch.cat([grad.flatten().float() for grad in grads])
        if _workers() > 1:
            distributed.all_reduce(flat)
        flat /= max(float(totals[1]), 1.0)
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        values: list[float] = totals.tolist()
        return values

    def _summed(self, totals: torch.Tensor) -> torch.Tensor:
        if _workers() > 1:
            totals = totals.to(self.device)
            distributed.all_reduce(totals)
        return totals.cpu()


def _workers() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _workers() > 1 else 0
