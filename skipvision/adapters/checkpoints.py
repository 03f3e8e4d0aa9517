"""A callback for `transformers.Trainer` and TRL that makes each checkpoint an adapter for `load_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from skipvision.adapters.save_load import check_whole, write_own_files
from skipvision.attach import attachment_of
from skipvision.errors import ConfigError


class SkipVisionCallback(TrainerCallback):
    """Writes summary layer and SkipConfig to every checkpoint: ``Trainer(callbacks=[SkipVisionCallback()])``.

    Raises:
        ConfigError: at the start of the training, if Skip-Vision is not attached.
        AdapterError: there, too, if the weights are sharded over processes.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that checkpoints of this model can be written."""
        model = _unwrapped(kwargs["model"])
        if attachment_of(model) is None:
            raise ConfigError("SkipVisionCallback: the model has no Skip-Vision attached: call attach first")
        check_whole(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the files to the checkpoint that was just saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            model = _unwrapped(kwargs["model"])
            name = model.active_adapters[0] if isinstance(model, PeftModel) else ""
            write_own_files(model, name, folder)


def _unwrapped(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, (PeftModel, PreTrainedModel)))
