"""Check that an adapter fits a model, without any weights in memory."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from skipvision.adapters.save_load import load_adapter
from skipvision.errors import AdapterError

_INCOMPLETE = "Found missing adapter keys"


def load_without_weights(base: nn.Module, folder: Path) -> nn.Module:
    """Load an adapter onto a model on the meta device, as `load_adapter` does.

    Raises:
        AdapterError: the adapter's files are damaged or incomplete, or belong to another model.
    """
    with warnings.catch_warnings():
        # The model is on the meta device, so the adapter's weights have nowhere to go.
        warnings.filterwarnings("ignore", ".*non-meta parameter in the checkpoint to a meta", UserWarning)
        warnings.filterwarnings("error", _INCOMPLETE, UserWarning)
        try:
            return load_adapter(base, folder)
        except UserWarning as warning:
            if not str(warning).startswith(_INCOMPLETE):
                raise
            raise AdapterError(f"{folder}: the adapter is incomplete: {warning}") from None
