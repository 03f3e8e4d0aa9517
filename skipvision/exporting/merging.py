"""Merge an adapter into its base model, and refuse the adapters for which that would change the answers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from skipvision.adapters.files import peft_config
from skipvision.adapters.fitting import load_without_weights
from skipvision.adapters.save_load import load_adapter
from skipvision.attach import attachment_of
from skipvision.engine.adapter_kinds import reason_to_refuse
from skipvision.errors import AdapterError
from skipvision.loading import build_model
from skipvision.summaries import AdapterSummaries
from skipvision.summary import SummaryLayer


def check_mergeable(config: PretrainedConfig, folder: Path) -> None:
    """Check, without weights, that an adapter fits a base model and can be merged into it.

    Args:
        config: of the base model.
        folder: the adapter.

    Raises:
        AdapterError: it does not fit, its kind cannot be merged, or it changes weights that modules share.
    """
    _check_kind(folder)
    with torch.device("meta"):
        base = build_model(config)
    model = load_without_weights(base, folder)
    if (attachment := attachment_of(model)) is not None:
        attachment.detach()
    if not isinstance(model, PeftModel):
        return
    if shared := _shared_weights(model):
        raise AdapterError(
            f"{folder}: this adapter cannot be merged: it changes {shared}, whose weights the model also "
            "uses elsewhere (tie_word_embeddings). Train an adapter without this module, or on a "
            "base model saved with untied weights"
        )
    try:
        with _quiet():
            model.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        if "meta" not in str(error):  # an operation without an implementation on the meta device
            (peft,) = model.peft_config.values()
            raise AdapterError(f"{folder}: this {_kind(peft)} adapter cannot be merged: {error}") from error


def merged(base: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, SummaryLayer | None]:
    """Merge an adapter into the weights of its base model, which changes.

    Args:
        base: the base model.
        folder: an adapter that `check_mergeable` accepts.

    Returns:
        The merged model without Skip-Vision, and the adapter's summary layer if it has one.

    Raises:
        AdapterError: PEFT cannot merge it, or merging gives weights that are not finite.
    """
    # A trainable adapter keeps its float32 weights, so that the sum is rounded once.
    model: Any = load_adapter(base, folder, is_trainable=True)
    attachment = attachment_of(model)
    summary = None if attachment is None else attachment.summary
    if attachment is not None:
        attachment.detach()
    if isinstance(model, PeftModel):
        try:
            with _quiet():  # PEFT's safe_merge would round the change before it is added
                model = model.merge_and_unload()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise AdapterError(f"{folder}: the adapter cannot be merged: {error}") from error
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise AdapterError(
                    f"{folder}: after the merge, {name} has values that are not finite: the adapter is "
                    "damaged, or its weights are too large for this dtype"
                )
    return model, summary


def _check_kind(folder: Path) -> None:
    peft = peft_config(folder)
    if peft is not None and (reason := reason_to_refuse(peft)):
        raise AdapterError(
            f"{folder}: this {_kind(peft)} adapter cannot be merged into its base model: {reason}"
        )


def _kind(peft: PeftConfig) -> str:
    return str(getattr(peft.peft_type, "value", peft.peft_type))


def _shared_weights(model: nn.Module) -> str | None:
    """Return the name of a module that the adapter changes and whose weights another module uses, too."""
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for name, module in model.named_modules():
        original: Any = None
        if isinstance(module, BaseTunerLayer):
            original = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper) and not isinstance(module, AdapterSummaries):
            original = module.original_module
        if original is not None and any(uses[id(weight)] > 1 for weight in original.parameters()):
            return name.removeprefix("base_model.model.")
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PEFT's warning of tied weights: such an adapter was refused if it changes them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings", UserWarning)
        yield
