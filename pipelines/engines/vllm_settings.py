"""What vLLM gets from a job's settings, and what it cannot do for a job.

The check builds vLLM's own configuration, so it finds at once what vLLM refuses: unknown arguments, a model
that it does not know, and a SkipConfig that the plug-in cannot run.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

import skipvision as sv
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_config
from pipelines.engines.model import EngineModel
from pipelines.shared.console import say
from skipvision.errors import ConfigError, SkipVisionError
from skipvision.exporting.names import needs_other_names
from skipvision.exporting.read import exported_settings

_NATIVE = {
    "prefill_tokens": "max_num_batched_tokens",
    "prefix_cache_bytes": "enable_prefix_caching",
    "compile_decoding": "enforce_eager",
}
"""Settings of the native engine alone, and the arguments of vLLM that come closest."""
_OURS = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "max_num_seqs": "engine.max_sequences",
    "kv_cache_memory_bytes": "engine.kv_budget_bytes",
    "trust_remote_code": "none, because no code of a model folder is run",
    "enable_lora": "model.adapter",
}
"""Arguments of vLLM that other settings decide."""
_PLUGINS = "vllm.general_plugins"


class VllmError(SkipVisionError):
    """vLLM cannot start, or does not answer any more."""


def check_settings(model: EngineModel, settings: BackendSection) -> None:
    """Raise `ConfigError`, listing every problem, for what vLLM cannot do for a job; before weights are read.

    Args:
        model: the model of the job.
        settings: with ``backend: vllm``.
    """
    problems = []
    if find_spec("vllm") is None:
        problems.append("engine.backend = vllm: vLLM is not installed here: pip install 'skipvision[vllm]'")
    for name, near in _NATIVE.items():
        if getattr(settings, name) != BackendSection.model_fields[name].default:
            problems.append(
                f"engine.{name} = {getattr(settings, name)}: only the native engine has it; for vLLM see "
                f"engine.engine_kwargs.{near}"
            )
    problems += [
        f"engine.engine_kwargs.{name}: this is decided by another setting: {_OURS[name]}"
        for name in settings.engine_kwargs
        if name in _OURS
    ]
    if model.attention != "sdpa":
        problems.append(
            f"model.attention = {model.attention}: vLLM has attention of its own; see "
            "engine.engine_kwargs.attention_backend"
        )
    if (problem := _skip_problem(model.skip)) is not None:
        problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))


def _skip_problem(skip: sv.SkipConfig) -> str | None:
    if skip.is_full:
        return None
    if not any(entry.value.startswith("skipvision.") for entry in entry_points(group=_PLUGINS)):
        return (
            "skip: vLLM prunes images by the plug-in of skipvision, which is not installed here: pip install "
            "'skipvision[vllm]', or set skip to full"
        )
    if skip.skipped:
        return (
            f"skip.skipped = {skip.skipped}: in vLLM no token can bypass the feed-forward networks: set it "
            "to 0 and calibrate or tune for that, or use engine.backend native"
        )
    return None


def vllm_model(model: EngineModel, folder: Path) -> EngineModel:
    """Return the model that vLLM loads: itself or, with an adapter, one exported to ``folder``.

    A model is also exported if transformers saved it under names that vLLM does not read.

    Raises:
        AdapterError: the adapter cannot be merged.
        ConfigError: the model cannot be exported.
    """
    if not needs_export(model):
        return model
    if not folder.exists():
        say(f"merging the model for vLLM into {folder}")
        sv.export(model.base, model.adapter, folder, config=model.skip)
    return replace(model, base=str(folder), adapter=None)


def remove_exported(folder: Path) -> None:
    """Remove the copy of a model that `vllm_model` has written to the job folder."""
    shutil.rmtree(folder, ignore_errors=True)


def needs_export(model: EngineModel) -> bool:
    """Return whether vLLM cannot load the model from where it is."""
    return model.adapter is not None or _needs_other_names(model.base)


def _needs_other_names(base: str) -> bool:
    if not Path(base).is_dir():
        return False  # the checkpoints on the hub have the older names
    index = Path(base) / "model.safetensors.index.json"
    if index.exists():
        names = list(json.loads(index.read_text())["weight_map"])
    elif (weights := Path(base) / "model.safetensors").exists():
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
    else:
        return False
    return needs_other_names(names, load_config(base))


def engine_arguments(model: EngineModel, settings: BackendSection, dtype: str) -> dict[str, Any]:
    """Return the arguments of vLLM's engine.

    Args:
        model: as `vllm_model` returned it.
        settings: of the engine.
        dtype: "float32", "bfloat16" or "auto".
    """
    arguments: dict[str, Any] = {
        "model": model.base,
        "dtype": dtype,
        "max_num_seqs": settings.max_sequences,
        "kv_cache_memory_bytes": settings.kv_budget_bytes,
        **settings.engine_kwargs,
    }
    if skip := _skip_argument(model):
        given = arguments.get("mm_processor_kwargs") or {}
        arguments["mm_processor_kwargs"] = {**given, "skip": skip}
    return arguments


def _skip_argument(model: EngineModel) -> Any:
    """Return the plug-in's setting where the job's SkipConfig is not the one in the model's config."""
    exported = exported_settings(load_config(model.base))
    own = (None if exported is None else exported.skip) or sv.SkipConfig.full()
    if own == model.skip or (own.is_full and model.skip.is_full):
        return None
    return "full" if model.skip.is_full else model.skip.model_dump()


def configure_vllm() -> None:
    """Set how vLLM logs and binds threads; call this before importing it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Ray has given this process some CPUs; vLLM would bind its threads to others.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def check_arguments(model: EngineModel, settings: BackendSection) -> None:
    """Build vLLM's configuration without an engine.

    Raises:
        ConfigError: vLLM refuses the model or the settings.
    """
    configure_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = engine_arguments(model, settings, "auto" if model.dtype == "auto" else model.dtype)
    try:
        AsyncEngineArgs(**arguments).create_engine_config()
    except Exception as error:  # vLLM, its plug-ins and pydantic raise errors of their own
        raise refusal(error) from error


def refusal(error: BaseException) -> ConfigError:
    """Return the error of a start of vLLM, with the innermost reason."""
    own: BaseException | None = error
    while own is not None and not isinstance(own, SkipVisionError):
        own = own.__cause__ or own.__context__
    lines = [line for line in str(own or error).splitlines() if line.strip()]
    return ConfigError(f"engine.backend = vllm: vLLM refuses these settings: {' '.join(lines[:4])[:600]}")
