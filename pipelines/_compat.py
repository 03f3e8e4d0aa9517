"""Every private or undocumented name of another library in the jobs, and the version it was last seen in.

Start here when a new version of that library breaks something.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin, modeling_utils

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of the entry point of a ``ray job submit`` (Ray 2.60.0)."""

RAY_PORT_VARIABLE = "RAY_GCS_SERVER_PORT"
"""Environment variable: the port of a Ray that ``ray.init(address="local")`` starts (Ray 2.60.0)."""

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""The file in which Ray Train keeps the list of a run's checkpoints (Ray 2.60.0)."""

LOOPBACK = "127.0.0.1"


def logits_at(model: nn.Module, kept: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """(n, V) logits of a call at the positions that ``kept`` (B, T) marks, row by row.

    The LM head runs there only. Older versions keep the same positions of all rows (transformers 5.20), so it
    also runs where another row is marked.
    """
    if hasattr(modeling_utils, "slice_logits_to_keep"):
        marked: torch.Tensor = model(**inputs, logits_to_keep=kept).logits
        return marked
    columns = kept.any(dim=0).nonzero().squeeze(1)
    logits: torch.Tensor = model(**inputs, logits_to_keep=columns).logits
    return logits[kept[:, columns]]


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """Let ``ray.init(address="local", _node_ip_address=LOOPBACK)`` listen on loopback only (Ray 2.60.0).

    Ray replaces a loopback address by that of the machine, and then listens on every interface, where anyone
    may run code. Its processes on a node with a loopback address listen there only.
    """
    from ray._private import services

    resolve = services.resolve_ip_for_localhost
    services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = resolve


def configure_ray_train() -> None:
    """Set how Ray Train watches and logs; call this before importing it (Ray 2.60.0).

    Its defaults suit runs of days: it polls its workers every two seconds, and their reports wait for that.
    Its print patch prints lines twice.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")


def keep_no_block_statistics(context: Any) -> None:
    """Let Ray Data forget the statistics of a block once the block is finished (Ray 2.60.0).

    It keeps 2 KB for each block until the data set ends, in the memory of the job. They are for
    `Dataset.stats`, which no job uses.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Forget(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            for operator in executor._topology:
                getattr(operator, "_output_blocks_stats", []).clear()

    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Forget]


def enable_checkpointing(model: Any) -> None:
    """Let a model run its layers again in the backward pass, by checkpoints that are not re-entrant.

    Its name is ``gradient_checkpointing_enable`` before transformers 5.23.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def visual_token_counter(
    processor: ProcessorMixin,
) -> Callable[[Sequence[tuple[int, int]]], list[int]] | None:
    """Return a function from image sizes (height, width) to numbers of visual tokens (transformers 5.23).

    None if the processor has none: then the image must be encoded to count them.
    """
    count: Any = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return None
    return lambda sizes: list(count(image_sizes=list(sizes)).num_image_tokens)
