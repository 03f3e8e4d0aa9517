"""Checks of a fine-tuning run before anything is started for it.

They take seconds and need no Ray: a wrong setting is an error at once, and not after workers have loaded a
model.
"""

from __future__ import annotations

from transformers import ProcessorMixin

from pipelines.cluster.resources import node_resources, worker_resources
from pipelines.engines.loading import check_known, empty_model, load_config, load_processor
from pipelines.finetune.config import FinetuneConfig, ScalingSection
from pipelines.finetune.learner import prepare


def check_model(config: FinetuneConfig) -> tuple[ProcessorMixin, dict[str, int]]:
    """Apply LoRA and Skip-Vision to the model without its weights.

    Returns:
        the model's processor, and its numbers of ``parameters`` and ``trainable_parameters``.

    Raises:
        ConfigError: no such model, or settings that do not fit it.
    """
    check_known(config.model.path, "model.path")
    processor = load_processor(config.model.path)
    model = prepare(empty_model(load_config(config.model.path)), config)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return processor, {
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trains in sizes if trains),
    }


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
