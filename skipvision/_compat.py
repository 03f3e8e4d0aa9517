"""Every private name of another library that the package uses, with the version it was last seen in.

Start here when a new version of that library breaks something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import _dynamo as dynamo  # torch 2.13
from transformers import PreTrainedModel


def generation_position_ids(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Return the position ids with which `generate` prefills a prompt (transformers 5.23).

    Args:
        model: that generates.
        input_ids: (B, T).
        model_kwargs: the model's other inputs, with ``past_key_values``.

    Returns:
        (B, T), or (A, B, T) for a model with A position axes.
    """
    generating: Any = model
    return generating._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))


def modules_kept_in_float32(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the name parts of modules that keep float32 in any dtype of the model (transformers 5.23)."""
    return tuple(model._keep_in_fp32_modules_strict or ())


@contextmanager
def recompile_limit(graphs: int) -> Iterator[None]:
    """Let `torch.compile` compile a function up to this many times in the ``with`` block (torch 2.13)."""
    with dynamo.config.patch(recompile_limit=graphs):
        yield
