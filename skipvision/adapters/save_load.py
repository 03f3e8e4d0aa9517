"""Save an adapter from a fine-tuned model, and load it onto its base model."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import distributed, nn
from transformers import PreTrainedModel

from skipvision.adapters.files import (
    FORMAT,
    PEFT_FILES,
    SKIP_CONFIG,
    SUMMARY_WEIGHTS,
    check_safe,
    difference,
    is_checkpoint,
    read_adapter,
    replace,
    summary_weights,
    weight_names,
)
from skipvision.adapters.patterns import check_patterns
from skipvision.anatomy.families import dissect
from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.errors import AdapterError
from skipvision.summaries import (
    SUMMARY,
    AdapterSummaries,
    summary_aside,
    summary_of_adapter,
    withdraw_notes,
)
from skipvision.summary import SummaryLayer

_LOAD_ERRORS = (
    *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError),
    *(SafetensorError, re.error),
)


def save_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None) -> Path:
    """Save LoRA weights, summary layer and SkipConfig of a fine-tuned model in one folder.

    The files are written to a temporary folder, which is then renamed, so a crash leaves no partial adapter.

    Args:
        model: a PEFT model, with or without Skip-Vision attached, or a bare model with it attached.
        folder: destination; an existing adapter there is replaced.
        name: PEFT adapter to save; None = the active one.

    Raises:
        AdapterError: the model has neither a PEFT adapter nor Skip-Vision, or no adapter of that name; its
            weights are sharded over processes; or the folder holds something else.
    """
    # Look inside the wrappers of DistributedDataParallel and torch.compile.
    model = next((m for m in model.modules() if isinstance(m, (PeftModel, PreTrainedModel))), model)
    attachment = attachment_of(model)
    if attachment is None and not isinstance(model, PeftModel):
        raise AdapterError(
            f"{type(model).__name__} has neither a PEFT adapter nor Skip-Vision attached: nothing to save"
        )
    if isinstance(model, PeftModel):
        name = _name_of(model, name)
    check_whole(model)
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if isinstance(model, PeftModel):
            _save_lora(model, str(name), partial)
        write_own_files(model, str(name), partial)
        _share(partial)
        replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_own_files(model: nn.Module, name: str, folder: Path) -> None:
    """Write summary layer and SkipConfig of an unwrapped model next to what PEFT or a trainer has saved."""
    summary = _summary(model, name)
    if summary is not None:
        _warn_if_frozen(model, summary)
        weights = {name: value.detach().cpu().contiguous() for name, value in summary.state_dict().items()}
        save_file(weights, folder / SUMMARY_WEIGHTS)
    description = _describe(model, attachment_of(model))
    (folder / SKIP_CONFIG).write_text(json.dumps(description, indent=2) + "\n")


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    config: SkipConfig | None = None,
    is_trainable: bool = False,
    name: str = "default",
) -> nn.Module:
    """Load a saved adapter onto its base model, and attach Skip-Vision as the adapter was trained.

    A PEFT model gets the adapter in addition to its others; ``model.set_adapter(name)`` switches LoRA and
    summary layer together.

    Args:
        model: the base model, or a PEFT model. If Skip-Vision is attached, then with the SkipConfig that the
            adapter was trained with.
        folder: an adapter from `save_adapter`; or a checkpoint of Trainer, TRL or PEFT.
        config: the SkipConfig that the caller expects; checked if given. A checkpoint without
            ``skip_config.json`` needs it: the SkipConfig that was attached in training.
        is_trainable: keep LoRA and summary layer trainable, to continue fine-tuning. Otherwise LoRA gets the
            model's dtype.
        name: PEFT's name for the adapter.

    Returns:
        The PEFT model, or ``model`` itself if the adapter has no LoRA. `attachment_of` returns its
        attachment. An adapter that was fine-tuned with full tokens attaches nothing.

    Raises:
        AdapterError: the folder is missing or damaged; the decoder has another width, number of layers or
            module shapes; the SkipConfig differs from ``config`` or from the attached one; or the name is in
            use. The model is unchanged then.

    Warns:
        UserWarning: the adapter fits, but was trained on a base model of another name.
    """
    folder = Path(folder)
    checkpoint = config is not None and is_checkpoint(folder)
    saved = _checkpoint(model, folder, config) if checkpoint else read_adapter(folder)
    skip = saved["skip"]
    _check_config(folder, skip, config)
    _check_shape(model, folder, saved)
    # Check everything before changing the model.
    if saved["lora"]:
        check_patterns(folder / PEFT_FILES[0], (module for module, _ in model.named_modules()))
    else:
        _check_trained_whole(model, folder)
    weights = None
    if skip is not None and skip.summary_tokens:
        weights = summary_weights(folder, saved["hidden_size"], skip.summary_tokens)
    attached = attachment_of(model)
    if attached is not None or isinstance(model, PeftModel):
        _check_addition(model, folder, saved, name)
    if isinstance(model, PeftModel):
        _add_lora(model, folder, is_trainable, name)
    else:
        if saved["lora"]:
            model = _load_lora(model, folder, is_trainable, name)
        if skip is not None and attached is None:
            attach(model, skip)
    summary = _summary(model, name)
    if summary is not None and weights is not None:
        summary.load_state_dict(weights)
        summary.requires_grad_(is_trainable)
    return model


def unload_adapters(model: nn.Module) -> None:
    """Remove PEFT from the base model that it wrapped; the base model keeps its own summary layer."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, BaseTunerLayer):
                setattr(parent, name, module.get_base_layer())
            elif isinstance(module, AdapterSummaries):
                setattr(parent, name, module.original_module)
    vars(model).pop("peft_config", None)


def _checkpoint(model: nn.Module, folder: Path, config: SkipConfig | None) -> dict[str, Any]:
    """Describe a checkpoint of PEFT as `read_adapter` does; PEFT checks the shapes itself."""
    check_safe(folder)
    anatomy = dissect(model)
    if config is not None and not config.summary_tokens and any(SUMMARY in n for n in weight_names(folder)):
        raise AdapterError(
            f"{folder} has a trained summary layer, but config has summary_tokens=0: pass the SkipConfig "
            "that was attached in training"
        )
    try:
        base = json.loads((folder / PEFT_FILES[0]).read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError) as error:
        raise AdapterError(f"{folder / PEFT_FILES[0]} cannot be read: {error}") from error
    return {
        "skip": config,
        "base_model": base or "",
        "lora": True,
        "hidden_size": anatomy.hidden_size,
        "layers": len(anatomy.layers),
    }


def _check_trained_whole(model: nn.Module, folder: Path) -> None:
    """Raise `AdapterError` if a folder has a whole model's weights, and ``model`` was loaded from another."""
    weights = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    base = _base_name(model)
    if base and any(file.exists() for file in weights) and Path(base).resolve() != folder.resolve():
        raise AdapterError(
            f"{folder} is a checkpoint of a whole model, and load_adapter reads only its summary layer: "
            f"load the model from it first, AutoModelForImageTextToText.from_pretrained({str(folder)!r}), "
            "then call load_adapter with the same folder"
        )


def _describe(model: nn.Module, attachment: Attachment | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "skip": attachment.config.model_dump() if attachment is not None else None,
        "base_model": _base_name(model),
        "lora": isinstance(model, PeftModel),
        "hidden_size": dissect(model).hidden_size,
        "layers": len(dissect(model).layers),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _name_of(model: PeftModel, name: str | None) -> str:
    names = list(model.active_adapters) if name is None else [name]
    if len(names) != 1 or names[0] not in model.peft_config:
        raise AdapterError(
            f"one adapter is saved at a time, not {names}: choose one of {list(model.peft_config)} with name="
        )
    return names[0]


def check_whole(model: nn.Module) -> None:
    """Raise `AdapterError` if the weights of a model are sharded over processes."""
    if not distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise AdapterError(
            "this model's weights are sharded over processes: gather the trainable ones with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict, load them into an unsharded copy "
            "of the model, and save that"
        )


def _save_lora(model: PeftModel, name: str, folder: Path) -> None:
    model.save_pretrained(str(folder), selected_adapters=[name])
    own = folder / name
    if name != "default":  # PEFT saves every other adapter in a subfolder
        for path in own.iterdir():
            path.rename(folder / path.name)
        own.rmdir()


def _share(folder: Path) -> None:
    """Set the permissions of the umask: safetensors and mkdtemp exclude all other users."""
    mode = (folder / SKIP_CONFIG).stat().st_mode & 0o666
    for path in folder.iterdir():
        path.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)


def _warn_if_frozen(model: nn.Module, summary: SummaryLayer) -> None:
    inside = getattr(dissect(model).decoder, SUMMARY)
    frozen = not any(parameter.requires_grad for parameter in summary.parameters())
    # A loaded adapter is frozen as a whole, and its summary layer was trained before.
    tuned = any(parameter.requires_grad for parameter in model.parameters())
    if isinstance(model, PeftModel) and frozen and tuned and not isinstance(inside, AdapterSummaries):
        warnings.warn(
            "the summary layer was attached before get_peft_model, which froze it, so the saved one is not "
            "trained: attach after get_peft_model",
            stacklevel=3,
        )


def _check_config(folder: Path, saved: SkipConfig | None, expected: SkipConfig | None) -> None:
    if expected is not None and saved != expected:
        raise AdapterError(
            f"{folder} was trained with another SkipConfig: {difference(saved, expected)}. Leave config out "
            "to run the adapter as it was trained, or train another adapter with this config"
        )


def _check_shape(model: nn.Module, folder: Path, saved: dict[str, Any]) -> None:
    anatomy, name = dissect(model), _base_name(model)
    if anatomy.hidden_size != saved["hidden_size"]:
        raise AdapterError(
            f"{folder} was trained on a decoder of hidden size {saved['hidden_size']} "
            f"(base model {saved['base_model']!r}), but this model has {anatomy.hidden_size}"
        )
    if len(anatomy.layers) != saved["layers"]:
        raise AdapterError(
            f"{folder} was trained on a decoder of {saved['layers']} layers (base model "
            f"{saved['base_model']!r}), but this model has {len(anatomy.layers)}"
        )
    # Compare the last part only: the folder may have moved.
    if name and saved["base_model"] and Path(name).name != Path(saved["base_model"]).name:
        warnings.warn(
            f"{folder} was trained on the base model {saved['base_model']!r}, but this one is {name!r}: "
            "the shapes fit, but the adapter only works as trained on its own base model",
            stacklevel=3,
        )


def _base_name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "name_or_path", "") or ""


def _check_addition(model: nn.Module, folder: Path, saved: dict[str, Any], name: str) -> None:
    attachment = attachment_of(model)
    attached = None if attachment is None else attachment.config
    full = SkipConfig.full()
    if (saved["skip"] or full) != (attached or full):
        raise AdapterError(
            f"{folder} was trained with another SkipConfig than this model has attached: "
            f"{difference(saved['skip'], attached)}. Adapters of one model share its attachment: load this "
            "one on another copy of the base model"
        )
    if not saved["lora"]:
        raise AdapterError(
            f"{folder} has no LoRA, only a summary layer: load it on another copy of the base model"
        )
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise AdapterError(
            f"this model has an adapter {name!r} already: give this one another name=, or call "
            "delete_adapter() first"
        )


def _load_lora(model: nn.Module, folder: Path, is_trainable: bool, name: str) -> PeftModel:
    with summary_aside(model, dissect(model).decoder):
        try:
            with _adapter_errors(folder):
                loaded = PeftModel.from_pretrained(
                    model,
                    str(folder.absolute()),
                    name,
                    is_trainable=is_trainable,
                    autocast_adapter_dtype=is_trainable,
                )
        except AdapterError:
            unload_adapters(model)
            raise
        # `load_adapter` loads the summary layer itself, without PEFT.
        withdraw_notes(loaded.peft_config)
    return loaded


def _add_lora(model: PeftModel, folder: Path, is_trainable: bool, name: str) -> None:
    summaries = getattr(dissect(model).decoder, SUMMARY, None)
    try:
        if isinstance(summaries, AdapterSummaries):
            summaries.without_summary = name
        with _adapter_errors(folder):
            model.load_adapter(
                str(folder.absolute()),
                name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=is_trainable,
            )
    except AdapterError:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise
    finally:
        if isinstance(summaries, AdapterSummaries):
            summaries.without_summary = None


@contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    """Raise `AdapterError` for any error of PEFT while it reads the folder."""
    for name in PEFT_FILES:
        # Without the file PEFT would look for a repository of the folder's name on the internet.
        if not (folder / name).exists():
            raise AdapterError(f"{folder} is an incomplete adapter: it has no {name}")
    try:
        with warnings.catch_warnings():
            # PEFT still uses the old name of this property of transformers.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    except _LOAD_ERRORS as error:
        raise AdapterError(f"{folder} does not fit this model, or its files are damaged: {error}") from error


def _summary(model: nn.Module, name: str) -> SummaryLayer | None:
    """Return the summary layer of this adapter, or of the bare model."""
    module = getattr(dissect(model).decoder, SUMMARY, None)
    return None if module is None else summary_of_adapter(module, name)
