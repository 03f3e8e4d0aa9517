"""Learners on a tiny model, for tests of one worker's training."""

from __future__ import annotations

import torch

import skipvision as sv
from pipelines.data.collate import Collator
from pipelines.engines.loading import load_frozen, load_processor
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.learner import Learner, prepare
from pipelines.finetune.on_policy import OnPolicy

CPU = torch.device("cpu")
SKIPPING = sv.SkipConfig(retained=0.25, skipped=0.25)


def changed(config: FinetuneConfig, **sections) -> FinetuneConfig:
    return FinetuneConfig.model_validate({**config.model_dump(), **sections})


def teaching(config, objective="distill", *, skip=SKIPPING, dropout=0.0, distillation=None, **training):
    training = {**config.training.model_dump(), "objective": objective, **training}
    return changed(
        config, skip=skip, lora={"dropout": dropout}, training=training, distillation=distillation or {}
    )


def learner_of(config: FinetuneConfig) -> Learner:
    model = prepare(load_frozen(config.model, torch.float32, CPU), config)
    on_policy = OnPolicy.of(config, model, load_processor(config.model.path))
    learner = Learner(model, config, CPU, on_policy=on_policy)
    with torch.no_grad():  # LoRA starts as nothing at all, and would have no gradient in its first half
        for name, parameter in learner.trainable.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return learner


def collator_of(config: FinetuneConfig) -> Collator:
    return Collator(load_processor(config.model.path))


def gradients(learner: Learner, batches) -> torch.Tensor:
    for batch in batches:
        learner.loss(batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in learner.trainable.values()])
