"""Self-distillation: the full-token base model teaches the same model with an adapter and Skip-Vision.

`as_teacher` turns a model into its own teacher for some calls, without a second copy of its weights.
`SoftTargets` are the distributions that the teacher predicts, and the divergence of the student from them.
Both models return logits at the caller's positions, so a token of the answer has the same position in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from peft import PeftModel
from torch import nn

from skipvision.attach import attachment_of
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, InputError
from skipvision.summary import SummaryLayer


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[None]:
    """Run the calls in the ``with`` block on the base model with all visual tokens.

    The adapter is disabled, nothing is skipped, the model is in eval mode, and no gradients are recorded.
    Afterwards the model trains as before. Call the teacher before the student: gradient checkpointing runs
    the student again in the backward pass, when it must be the student.

    Args:
        model: a PEFT model, bare or wrapped, or a model of which only the summary layer trains; usually with
            Skip-Vision attached.

    Raises:
        ConfigError: weights other than those of the adapter train, so the base model is no fixed teacher.
    """
    attachment = attachment_of(model)
    training = {module: module.training for module in model.modules()}
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.callback(_restore, training, trains)
        stack.enter_context(torch.no_grad())
        tuned = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
        if tuned is not None:
            stack.enter_context(tuned.disable_adapter())
        _check_fixed(model)
        if attachment is not None:
            stack.callback(setattr, attachment, "plan", attachment.plan)
            stack.enter_context(attachment.using(SkipConfig.full()))
        model.eval()
        yield


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A teacher's distributions over the vocabulary of V tokens at n positions.

    Attributes:
        log_probs: (n, V) log probabilities. With ``tokens``, (n, k + 1): those of k tokens, and last that of
            all other tokens together.
        tokens: (n, k) the most likely tokens at each position; None = all V tokens in their order.
        temperature: the logits were divided by it.
    """

    log_probs: torch.Tensor
    tokens: torch.Tensor | None
    temperature: float

    @classmethod
    def of(cls, logits: torch.Tensor, *, temperature: float = 1.0, top_k: int | None = None) -> Self:
        """Keep a teacher's distributions.

        Args:
            logits: (n, V) the teacher's.
            temperature: divides the logits; above 1, unlikely tokens weigh more.
            top_k: keep the most likely tokens only, and the others as one; None = keep all.

        Raises:
            ConfigError: the temperature is not above 0, or ``top_k`` is not in 1 … V.
        """
        if not temperature > 0 or temperature == float("inf"):
            raise ConfigError(f"temperature={temperature}: pass a number above 0")
        vocabulary = logits.shape[-1]
        if top_k is not None and not 1 <= top_k <= vocabulary:
            raise ConfigError(f"top_k={top_k}: pass 1 to {vocabulary}, the tokens of the vocabulary, or None")
        scaled = _scaled(logits.detach(), temperature)
        if top_k is None or top_k == vocabulary:
            return cls(scaled.log_softmax(dim=-1), None, temperature)
        tokens = scaled.topk(top_k, dim=-1).indices
        return cls(_log_probs(scaled, tokens), tokens, temperature)

    def to(self, device: torch.device) -> Self:
        """Return the targets on a device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, log_probs=self.log_probs.to(device), tokens=tokens)

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """(n,) KL(teacher ‖ student) in nats, times temperature², for the student's logits (n, V).

        The factor keeps the size of the gradients when the temperature changes. Top-k targets compare the
        probabilities of the k tokens and of all others together. That is at most the divergence over all
        tokens, and 0 if those k + 1 probabilities agree.

        Raises:
            InputError: the logits are of another number of positions or tokens.
        """
        rows, columns = self.log_probs.shape
        fits = logits.ndim == 2 and len(logits) == rows
        if not fits or (self.tokens is None and logits.shape[1] != columns):
            needed = f"({rows}, {columns})" if self.tokens is None else f"({rows}, vocabulary)"
            raise InputError(
                f"the student's logits are {tuple(logits.shape)}, but the teacher's targets need {needed}: "
                "take the same positions of both"
            )
        scaled = _scaled(logits, self.temperature)
        student = scaled.log_softmax(dim=-1) if self.tokens is None else _log_probs(scaled, self.tokens)
        teacher = self.log_probs.to(student.dtype)
        probs = teacher.exp()
        # A token that the teacher excludes adds nothing, whatever the student's log probability is.
        terms = torch.where(probs > 0, probs * (teacher - student), 0.0)
        return terms.sum(dim=-1) * self.temperature**2


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return logits divided by the temperature, in float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()) / temperature


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(n, k + 1) log probabilities of ``tokens`` (n, k), and last that of all others together."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    # Not −∞, whose gradients are NaN where a model excludes all other tokens.
    others = logits.scatter(-1, tokens, torch.finfo(logits.dtype).min)
    kept = torch.cat([logits.gather(-1, tokens), others.logsumexp(dim=-1, keepdim=True)], dim=-1)
    return kept - total


def _check_fixed(model: nn.Module) -> None:
    """Raise `ConfigError` if weights train although adapters are disabled; the teacher has no summary."""
    summaries = [module for module in model.modules() if isinstance(module, SummaryLayer)]
    own = {parameter for summary in summaries for parameter in summary.parameters()}
    learnt = [name for name, p in model.named_parameters() if p.requires_grad and p not in own]
    if learnt:
        raise ConfigError(
            f"{len(learnt)} weights of the base model train, such as {learnt[0]}, so it is no fixed teacher: "
            "freeze them and train an adapter (get_peft_model)"
        )


def _restore(training: dict[nn.Module, bool], trains: dict[nn.Parameter, bool]) -> None:
    """Restore the mode of each module, and which parameters train: PEFT freezes adapters that it disables."""
    for module, mode in training.items():
        module.training = mode
    for parameter, requires_grad in trains.items():
        parameter.requires_grad_(requires_grad)
