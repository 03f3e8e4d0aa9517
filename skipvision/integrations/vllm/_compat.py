"""Changes to vLLM itself, each with the version that needed it."""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.model_executor.models.interfaces import supports_multimodal_pruning
from vllm.platforms import current_platform


def pass_positions_on_cpu() -> None:
    """Let the CPU's model runner take positions from embeddings, as the one for GPUs does.

    0.32: ``CPUModelRunner.load_model`` does not set ``is_multimodal_pruning_enabled``.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    gather = CPUModelRunner._gather_mm_embeddings
    if hasattr(gather, "__wrapped__"):
        return

    @wraps(gather)
    def gather_with_positions(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = (
            supports_multimodal_pruning(self.model) and config.is_multimodal_pruning_enabled()
        )
        return gather(self, *args, **kwargs)

    CPUModelRunner._gather_mm_embeddings = gather_with_positions
