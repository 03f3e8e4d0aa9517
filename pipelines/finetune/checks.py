"""Checks of a fine-tuning run before anything is started for it.

They take seconds and need no Ray: a wrong setting is an error at once, and not after workers have loaded a
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from transformers import ProcessorMixin

import skipvision as sv
from pipelines.cluster.resources import node_resources, worker_resources
from pipelines.engines.loading import check_known, empty_model, load_config, load_processor
from pipelines.finetune.config import FinetuneConfig, ScalingSection
from pipelines.finetune.learner import prepare
from skipvision.errors import ConfigError


class CheckedModel(NamedTuple):
    """A model that can be trained under the settings.

    Attributes:
        processor: its processor.
        parameters: its numbers of ``parameters`` and ``trainable_parameters``.
        positions: the tokens of the longest row that it can read; None = no limit.
    """

    processor: ProcessorMixin
    parameters: Mapping[str, int]
    positions: int | None


def check_model(config: FinetuneConfig) -> CheckedModel:
    """Apply LoRA and Skip-Vision to the model without its weights.

    Raises:
        ConfigError: no such model, or settings that do not fit it, or under which it cannot be trained.
    """
    check_known(config.model.path, "model.path")
    processor = load_processor(config.model.path)
    model_config = load_config(config.model.path)
    vocabulary = model_config.get_text_config().vocab_size
    top_k = config.distillation.top_k or 0
    if config.training.teaches and top_k > vocabulary - config.distillation.cache:
        remedy = "fewer" if config.distillation.cache else "fewer, or null for all"
        raise ConfigError(f"distillation.top_k = {top_k}: the model has {vocabulary} tokens; set {remedy}")
    model = prepare(empty_model(model_config), config)
    attachment = sv.attachment_of(model)
    if attachment is not None:
        attachment.check_training()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    parameters = {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trains in sizes if trains),
    }
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return CheckedModel(processor, parameters, positions)


def check_workers(scaling: ScalingSection) -> dict[str, float]:
    """Return the resources of each worker.

    Raises:
        ResourceError: the cluster, or this machine if there is none, has too few.
    """
    if scaling.autoscaling:
        return {"CPU": float(scaling.cpus_per_worker or 1), "GPU": float(scaling.gpus_per_worker or 0)}
    return worker_resources(
        node_resources(), scaling.workers, scaling.cpus_per_worker, scaling.gpus_per_worker
    )
