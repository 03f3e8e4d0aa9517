"""FLOPs and KV bytes of a tuned model on given rows, measured and predicted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipvision as sv
from pipelines.data.collate import Batch, Collator
from pipelines.data.rows import TrainingRow
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import arithmetic, load_frozen, load_processor
from pipelines.finetune.flops import RowTokens, predicted_cost
from pipelines.finetune.objective import summed_loss
from skipvision.kv_cache import cache_bytes


def measure_costs(
    base: BaseModelSection,
    adapter: Path,
    skip: sv.SkipConfig | None,
    rows: Sequence[TrainingRow],
    device: torch.device,
) -> dict[str, float]:
    """Return each cost as its mean over the rows.

    Prefill covers the prompt, a training step the whole row. Every cost ``name`` is measured operation by
    operation; ``name_predicted`` is what `predict_cost` says.
    """
    frozen = load_frozen(base, arithmetic("auto", device), device)
    model = sv.load_adapter(frozen, adapter, is_trainable=True).eval()
    collate = Collator(load_processor(base.path))
    means: dict[str, float] = {}
    for row in rows:
        for name, value in _costs_of_row(model, skip, collate([row]).to(device)).items():
            means[name] = means.get(name, 0.0) + value / len(rows)
    return means


def _costs_of_row(model: Any, skip: sv.SkipConfig | None, batch: Batch) -> dict[str, float]:
    inputs, images = batch.inputs, batch.images
    length = inputs["input_ids"].shape[1]
    visual, _, text = RowTokens.of(model, batch)
    prompt = {k: v[:, : visual + text] if v.shape == (1, length) else v for k, v in inputs.items()}
    predicted = predicted_cost(model, skip, batch)
    prefill = partial(model, **prompt, use_cache=True, logits_to_keep=1)
    with model.disable_adapter(), torch.no_grad():  # a merged adapter adds no FLOPs
        prefill_flops = sv.measure_flops(prefill)
        cache = prefill().past_key_values
    kv_bytes = cache_bytes(cache)
    return {
        "prefill_flops": prefill_flops,
        "prefill_flops_predicted": predicted.prefill_flops,
        "train_flops": sv.measure_flops(partial(_train_step, model, batch)),
        "train_flops_predicted": predicted.train_flops,
        "kv_bytes": kv_bytes,
        "kv_bytes_predicted": predicted.kv_bytes,
        "kv_bytes_per_image": kv_bytes * (1 - text / cache.get_seq_length()) / max(images, 1),
    }


def _train_step(model: nn.Module, batch: Batch) -> None:
    """Run one forward and backward pass, without an optimiser step."""
    summed_loss(model, batch)[0].backward()
    model.zero_grad()
