"""Write an exported model: the base model with its adapter merged, and what Skip-Vision needs.

The folder appears complete or not at all: it is written under ``.NAME.partial`` next to its final path,
and then renamed. The next export to the same folder replaces what a killed one left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from skipvision.adapters.files import read_adapter
from skipvision.anatomy.families import dissect
from skipvision.attach import attach
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, Problems
from skipvision.exporting.atomic_folder import check_destination, new_folder
from skipvision.exporting.card import model_card
from skipvision.exporting.merging import check_mergeable, merged
from skipvision.exporting.names import rename_weights
from skipvision.exporting.read import EXPORTED, Exported
from skipvision.loading import build_model, check_weights, load_config, load_model, load_processor
from skipvision.summary import SummaryLayer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ExportPlan:
    """A checked export.

    Attributes:
        base: folder or Hugging Face id of the base model.
        adapter: folder of the adapter; None = the base model alone.
        folder: where the exported model will be.
        exported: what its ``config.json`` will say.
        dtype: dtype of its weights; "auto" = as stored.
        overwrite: replace a model that was exported to the folder before.
    """

    base: str
    adapter: Path | None
    folder: Path
    exported: Exported
    dtype: Dtype
    overwrite: bool


def export(
    base: str | Path,
    adapter: str | Path | None,
    folder: str | Path,
    *,
    config: SkipConfig | None = None,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    numbers: Mapping[str, object] | None = None,
) -> Path:
    """Write base model and adapter as one folder that transformers, this library and vLLM load.

    LoRA is merged into the weights. ``config.json`` holds the SkipConfig; the summary layer, processor,
    tokenizer, generation config and a model card are there, too. `from_exported` loads the folder with
    Skip-Vision attached; ``AutoModelForImageTextToText.from_pretrained`` loads it with full tokens.

    Args:
        base: folder or Hugging Face id of the base model and its processor.
        adapter: folder of an adapter from `save_adapter`; None = the base model with ``config``.
        folder: destination. It must not exist, unless ``overwrite`` is set and it holds an exported model.
        config: the SkipConfig to export; None = the adapter's. With an adapter it may only differ from the
            adapter's where the summary layer stays the same or is not used.
        dtype: dtype of the weights; "auto" = as stored.
        overwrite: replace an exported model in ``folder`` once the new one is complete.
        numbers: results for the model card by their names, such as accuracies.

    Returns:
        The absolute folder.

    Raises:
        ConfigError: the base model cannot be used, or the settings contradict each other; the message lists
            all problems. Nothing has been written then.
        AdapterError: the adapter is damaged, does not fit, or cannot be merged.
    """
    plan = plan_export(base, adapter, folder, config=config, dtype=dtype, overwrite=overwrite)
    return write_export(plan, numbers or {})


def plan_export(
    base: str | Path,
    adapter: str | Path | None,
    folder: str | Path,
    *,
    config: SkipConfig | None = None,
    dtype: Dtype = "auto",
    overwrite: bool = False,
) -> ExportPlan:
    """Check everything but the values of the weights; the arguments are those of `export`.

    Raises:
        ConfigError: as `export`.
        AdapterError: as `export`.
    """
    folder = Path(folder).expanduser().absolute()
    problems = Problems("this export")
    collect = problems.collect
    collect(lambda: _check_dtype(dtype))
    collect(lambda: check_destination(folder, overwrite=overwrite))
    model = collect(lambda: _checked_base(base))
    saved = None if adapter is None else collect(lambda: read_adapter(adapter))
    skip = config or (saved or {}).get("skip")
    collect(lambda: _check_given(adapter, config))
    if saved is not None and config is not None:
        collect(lambda: _check_summary(config, saved["skip"], adapter))
    if model is not None and saved is not None and adapter is not None:
        collect(lambda: check_mergeable(model, Path(adapter)))
    exported: Any = None if model is None else collect(lambda: _described(model, skip))
    problems.raise_any()
    return ExportPlan(
        str(base), None if adapter is None else Path(adapter), folder, exported, dtype, overwrite
    )


def write_export(plan: ExportPlan, numbers: Mapping[str, object]) -> Path:
    """Write what `plan_export` has checked, and return the folder; ``numbers`` are for the model card."""
    processor = load_processor(plan.base)
    dtype = "auto" if plan.dtype == "auto" else getattr(torch, plan.dtype)
    base = load_model(plan.base, dtype=dtype)
    model, summary = (base, None) if plan.adapter is None else merged(base, plan.adapter)
    with new_folder(plan.folder, overwrite=plan.overwrite) as partial:
        _write_model(model, plan.exported, partial)
        _write_summary(plan.exported, summary, partial)
        processor.save_pretrained(str(partial))
        card = model_card(plan.base, plan.adapter, model.config, plan.exported, numbers)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _share(partial)
    return plan.folder


def _write_model(model: PreTrainedModel, exported: Exported, folder: Path) -> None:
    setattr(model.config, EXPORTED, exported.as_json())
    model.save_pretrained(str(folder), max_shard_size="5GB")
    rename_weights(folder, model.config)


def _write_summary(exported: Exported, summary: SummaryLayer | None, folder: Path) -> None:
    if exported.summary_file is None or exported.skip is None:
        return
    # Without an adapter the layer is untrained: the summary is the mean.
    layer = summary or SummaryLayer(exported.hidden_size, exported.skip.summary_tokens)
    file = folder / exported.summary_file
    file.parent.mkdir()
    weights = {name: value.detach().float().cpu().contiguous() for name, value in layer.state_dict().items()}
    save_file(weights, file)


def _checked_base(base: str | Path) -> PretrainedConfig:
    """Load a base model's config after checking that its weights and its processor can be used."""
    if Path(base).is_dir():
        check_weights(base, [file.name for file in Path(base).iterdir()])
    config = load_config(base)
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{base}: the weights are quantised, and an adapter cannot be merged into them exactly: "
            "export the model that was quantised, and quantise the result"
        )
    load_processor(base)
    return config


def _described(config: PretrainedConfig, skip: SkipConfig | None) -> Exported:
    """Check that a model runs under a SkipConfig, and return the entry of ``config.json``."""
    with torch.device("meta"):
        model = build_model(config)
    if skip is not None:
        attach(model, skip).detach()
    anatomy = dissect(model)
    return Exported(skip, anatomy.hidden_size, len(anatomy.layers))


def _check_summary(config: SkipConfig, trained: SkipConfig | None, adapter: str | Path | None) -> None:
    own = 0 if trained is None else trained.summary_tokens
    if config.summary_tokens not in (0, own):
        raise ConfigError(
            f"summary_tokens={config.summary_tokens}, but the adapter {adapter} was trained with {own}: use "
            "that number or 0"
        )


def _check_given(adapter: object, config: SkipConfig | None) -> None:
    if adapter is None and config is None:
        raise ConfigError("neither an adapter nor a SkipConfig is given: nothing to export")


def _check_dtype(dtype: object) -> None:
    known = get_args(Dtype)
    if dtype not in known:
        raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(map(repr, known))}")


def _share(folder: Path) -> None:
    """Set the permissions of the umask: safetensors excludes all other users."""
    mode = (folder / "config.json").stat().st_mode & 0o666
    for path in folder.rglob("*"):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)
