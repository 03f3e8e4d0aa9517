"""Translate a model's settings into vLLM's arguments, and reject what vLLM cannot do for an endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipelines.engines.model import EngineModel
from pipelines.engines.vllm.pruning import instead_of_skipped, mapped, mapped_config, pruning_problem
from pipelines.engines.vllm.settings import SettingNames, check_arguments, check_settings, needs_export
from pipelines.tracking.registry import is_registered
from serve.config import ModelSection
from skipvision import SkipConfig, read_adapter
from skipvision.adapters.files import PEFT_FILES
from skipvision.errors import AdapterError, ConfigError, Problems
from skipvision.exporting.read import settings_of

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``max_lora_rank`` may have."""

_UNKNOWN_RANK = 64
"""Max rank of adapters that come from a registry later."""

_MAX_AT_ONCE = 8
"""Max adapters in one batch unless ``engine_kwargs`` has ``max_loras``: each takes memory."""

_TOWER = re.compile(r"\.(vision|visual|image|multi_modal_projector|merger|connector|mlp1)")
"""Weights of an adapter that are not the language model's."""


def engine_model(section: ModelSection) -> EngineModel:
    """Return the base model as vLLM's engine takes it, with `mapped` skipped tokens."""
    exported = settings_of(section.path)
    skip = section.skip or (None if exported is None else exported.skip) or SkipConfig.full()
    model = EngineModel(
        base=section.path,
        label=section.path,
        adapter=None,
        adapter_label=None,
        skip=skip,
        dtype=section.dtype,
        attention=section.attention,
    )
    return mapped(model, section.engine)


def further_arguments(section: ModelSection) -> dict[str, Any]:
    """Return arguments of vLLM that an endpoint needs, and ``engine_kwargs`` may replace."""
    # With these, a schema allows the same answers as with the native engine.
    grammar = {"backend": "guidance", "disable_any_whitespace": True}
    arguments: dict[str, Any] = {"structured_outputs_config": grammar}
    if section.adapters:
        # While an alias moves, the old and the new version are loaded.
        number = 2 * len(section.adapters)
        arguments |= {
            "enable_lora": True,
            "max_loras": min(number, _MAX_AT_ONCE),
            "max_cpu_loras": max(number, section.engine.engine_kwargs.get("max_loras", 0)),
            "max_lora_rank": _max_rank(section),
        }
    return arguments


def _max_rank(section: ModelSection) -> int:
    ranks = [_rank(Path(source)) for source in section.adapters.values() if not is_registered(source)]
    if len(ranks) < len(section.adapters):
        ranks.append(_UNKNOWN_RANK)
    return next((rank for rank in _RANKS if rank >= max(ranks)), _RANKS[-1])


def _rank(folder: Path) -> int:
    config = _peft_config(folder)
    return max([int(config.get("r", 0)), *(config.get("rank_pattern") or {}).values()])


def _peft_config(folder: Path) -> dict[str, Any]:
    file = folder / PEFT_FILES[0]
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def check_model(section: ModelSection, index: int) -> None:
    """Check a model and its adapters before Ray starts.

    Args:
        section: with the backend "vllm", and absolute paths.
        index: of the model among those of the deployment.

    Raises:
        ConfigError: vLLM cannot serve the model. It names every setting that is in the way.
        AdapterError: vLLM cannot serve the only adapter with a problem.
    """
    base, model = f"models.{index}", engine_model(section)
    names = SettingNames(f"{base}.engine", f"{base}.", f"{base}.skip", f"{base}.adapters", of_job=False)
    problems, skips = Problems(), {model.skip}
    problems.collect(lambda: check_settings(model, section.engine, names))
    problems.collect(lambda: _check_weights(section, base))
    problems.collect(lambda: _check_gpus(section, base))
    problems.collect(lambda: _check_rank(section, base))
    for name, source in section.adapters.items():
        if not is_registered(source):
            skip = problems.collect(partial(check_adapter, name, Path(source), section))
            if skip is not None and not skip.is_full:
                problems.collect(partial(_check_pruning, f"{base}.adapters.{name}"))
            skips |= set() if skip is None else {skip}
    problems.raise_any()
    for skip in skips:
        check_arguments(replace(model, skip=skip), section.engine, names, further_arguments(section))


def _check_pruning(name: str) -> None:
    if (problem := pruning_problem()) is not None:
        raise ConfigError(f"{name}: its SkipConfig prunes images: {problem}, or leave the adapter out")


def _check_weights(section: ModelSection, name: str) -> None:
    if needs_export(EngineModel(section.path, "", None, None, SkipConfig.full(), "auto", "sdpa")):
        raise ConfigError(
            f"{name}.path = {section.path}: vLLM does not know the names of its weights: export the model by "
            "jobs/export.py (for full tokens with skip.retained 1.0, skip.skipped 0, skip.summary_tokens 0), "
            "and serve the folder that it writes"
        )


def _check_gpus(section: ModelSection, name: str) -> None:
    given, gpus = section.engine.engine_kwargs, section.scaling.gpus_per_engine
    wanted = given.get("tensor_parallel_size", 1) * given.get("pipeline_parallel_size", 1)
    if 0 < gpus < wanted and wanted > 1:
        raise ConfigError(
            f"{name}.scaling.gpus_per_engine = {gpus:g}: {name}.engine.engine_kwargs spreads the model over "
            f"{wanted} GPUs"
        )


def _check_rank(section: ModelSection, name: str) -> None:
    limit = section.engine.engine_kwargs.get("max_lora_rank")
    for adapter, source in section.adapters.items():
        if limit is not None and not is_registered(source) and (rank := _rank(Path(source))) > limit:
            raise ConfigError(
                f"{name}.engine.engine_kwargs.max_lora_rank = {limit}: adapter {adapter} has rank {rank}: "
                "raise the limit, or leave it out"
            )


def check_adapter(name: str, folder: Path, section: ModelSection) -> SkipConfig:
    """Return the SkipConfig of an adapter that vLLM can serve next to its base model.

    Args:
        name: of the adapter.
        folder: its files.
        section: the base model and its engine.

    Raises:
        AdapterError: the folder holds no adapter, or one that vLLM cannot serve.
    """
    saved = read_adapter(folder)
    skip = mapped_config(saved["skip"] or SkipConfig.full(), section.path, section.engine)
    reasons = [*_unservable(skip), *(_no_lora(folder) if saved["lora"] else ())]
    if reasons:
        merging = "jobs/export.py"
        if skip.skipped:
            merging += f" with {instead_of_skipped(skip, section.path, 'skip')}"
        raise AdapterError(
            f"adapter {name} ({folder}): vLLM cannot serve it next to its base model, because "
            f"{'; and '.join(reasons)}. Merge it by {merging}, and serve the folder that this writes as a "
            "model of its own, or use engine.backend native"
        )
    return skip


def _unservable(skip: SkipConfig) -> Iterator[str]:
    if skip.skipped:
        yield f"skipped = {skip.skipped}: in vLLM no token can bypass the feed-forward networks"
    if skip.summary_tokens:
        yield f"summary_tokens = {skip.summary_tokens}: its summary layer is not LoRA"


def _no_lora(folder: Path) -> Iterator[str]:
    config = _peft_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"its kind is {kind}, not LORA"
        return
    if config.get("use_dora"):
        yield "it is DoRA (use_dora)"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "it changes biases"
    with safe_open(folder / PEFT_FILES[1], "pt") as file:
        keys = list(file.keys())
    if any(_TOWER.search(key) for key in keys):
        yield "it changes the vision tower or the projector, and not only the language model"
    others = sorted({key.split(".")[-2] for key in keys if ".lora_" not in key})
    if others:
        yield f"it has weights that are not LoRA ({', '.join(others)})"
