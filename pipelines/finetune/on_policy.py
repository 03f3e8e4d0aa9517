"""Answers that the student writes itself, for its teacher to score.

A student that only ever reads good answers is not trained on the prefixes that follow its own mistakes
(Agarwal et al., https://arxiv.org/abs/2306.13649). In a share of the steps each row's last answer is
therefore replaced by one that the student samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import ProcessorMixin

from pipelines.data.collate import IGNORED, Batch
from pipelines.evaluation.exact_match import end_tokens, evaluation_mode
from pipelines.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class OnPolicy:
    """Chooses the steps with the student's own answers, and generates these.

    Attributes:
        share: share of the steps, 0–1.
        seed: determines the steps.
        max_length: max tokens of a row with its answer.
        ends: ids of the tokens that end an answer.
        never: ids of the other special tokens, which no answer contains.
        padding: id of the padding token.
    """

    share: float
    seed: int
    max_length: int
    ends: tuple[int, ...]
    never: tuple[int, ...]
    padding: int

    @classmethod
    def of(cls, config: FinetuneConfig, model: Any, processor: ProcessorMixin) -> OnPolicy | None:
        """Return the settings of a run; None if it only learns from the rows' answers."""
        share = config.distillation.on_policy
        if not share:
            return None
        tokenizer: Any = cast(Any, processor).tokenizer
        ends = end_tokens(model, tokenizer)
        placeholder = getattr(model.config, "image_token_id", None)
        special = {*tokenizer.all_special_ids, *([] if placeholder is None else [placeholder])}
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return cls(
            share,
            config.seed,
            max_length=min(config.data.max_length, positions or config.data.max_length),
            ends=tuple(ends),
            never=tuple(sorted(special - set(ends))),
            padding=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    def applies(self, step: int) -> bool:
        """Whether the student writes the answers of this step: the same for all workers and restarts."""
        return bool(np.random.default_rng([self.seed, step]).random() < self.share)

    def rewrite(self, model: nn.Module, batch: Batch) -> Batch:
        """Return the batch with the last answer of each row sampled from the model.

        Earlier turns are kept and not learnt. An answer has at most as many tokens as the longest of the
        batch, so that a step costs about the same plus the generation.
        """
        starts, longest = _last_answers(batch.labels)
        limit = max(1, min(longest, self.max_length - int(starts.max())))
        answers = self._sample(model, _prompts(batch, starts, self.padding), limit)
        ended = torch.isin(answers, torch.tensor(self.ends, device=answers.device))
        written = ended.cumsum(dim=1) - ended.long() == 0  # up to the first end token, and that one
        return _joined(batch, starts, answers, written, self.padding)

    def _sample(self, model: Any, inputs: dict[str, torch.Tensor], limit: int) -> torch.Tensor:
        """(B, limit) or shorter: sampled from the model's own distribution over the other tokens."""
        with evaluation_mode(model):
            tokens: torch.Tensor = model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=True,
                num_beams=1,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                suppress_tokens=list(self.never),
                eos_token_id=list(self.ends),
                pad_token_id=self.padding,
            )
        return tokens[:, inputs["input_ids"].shape[1] :]


def _last_answers(labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(B,) the first position of each row's last answer, and the number of tokens of the longest."""
    learnt = labels != IGNORED
    begins = learnt & ~torch.nn.functional.pad(learnt[:, :-1], (1, 0))
    positions = torch.arange(labels.shape[1], device=labels.device)
    starts = torch.where(begins, positions, -1).amax(dim=1)
    lengths = (learnt & (positions >= starts[:, None])).sum(dim=1)
    return starts, int(lengths.max())


def _prompts(batch: Batch, starts: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    """Return the inputs of all rows up to their last answers, padded on the left."""
    width = int(starts.max())
    shifts = width - starts  # of each row to the right
    source = torch.arange(width, device=starts.device) - shifts[:, None]
    inputs = dict(batch.inputs)
    for name in _per_token(batch):
        values = inputs[name].gather(1, source.clamp(min=0))
        inputs[name] = values.masked_fill(source < 0, padding if name == "input_ids" else 0)
    return inputs


def _joined(
    batch: Batch, starts: torch.Tensor, answers: torch.Tensor, written: torch.Tensor, padding: int
) -> Batch:
    """Return the batch with these answers (B, n) from ``starts`` on, padded on the right."""
    rows, width = len(starts), int((starts + written.sum(dim=1)).max())
    positions = torch.arange(width, device=starts.device).expand(rows, width)
    index = positions - starts[:, None]  # in the answer
    source = index.clamp(0, answers.shape[1] - 1)
    in_answer = (index >= 0) & (index < answers.shape[1]) & written.gather(1, source)
    before = index < 0
    new = answers.gather(1, source)
    inputs = dict(batch.inputs)
    for name in _per_token(batch):
        old = inputs[name].gather(1, positions.clamp(max=inputs[name].shape[1] - 1))
        inputs[name] = old.masked_fill(~before, padding if name == "input_ids" else 0)
    inputs["input_ids"] = torch.where(in_answer, new, inputs["input_ids"])
    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(in_answer, 1)
    labels = torch.where(in_answer, new, IGNORED)
    return replace(batch, inputs=inputs, labels=labels)


def _per_token(batch: Batch) -> list[str]:
    """Return the names of the inputs that have a value for each token of each row."""
    shape = batch.inputs["input_ids"].shape
    return [name for name, value in batch.inputs.items() if value.shape == shape]
