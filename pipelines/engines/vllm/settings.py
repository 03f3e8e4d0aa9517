"""Translate the settings of a job or of the endpoint into vLLM's arguments, and reject what vLLM cannot do.

The check builds vLLM's own configuration, so it finds at once what vLLM refuses: unknown arguments, a model
that it does not know, and a SkipConfig that the plug-in cannot run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open

import skipvision as sv
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_config
from pipelines.engines.model import EngineModel
from pipelines.engines.vllm.pruning import skip_problems
from pipelines.shared.console import say
from skipvision.errors import ConfigError, SkipVisionError
from skipvision.exporting.names import needs_other_names
from skipvision.exporting.read import exported_settings
from skipvision.integrations.vllm.settings import KEYWORD, MAP_SKIPPED

_NATIVE = {
    "prefill_tokens": "max_num_batched_tokens",
    "prefix_cache_bytes": "enable_prefix_caching",
    "compile_decoding": "enforce_eager",
}
"""Settings of the native engine alone, and the arguments of vLLM that come closest."""
_OURS = {
    "model": "{model}path",
    "tokenizer": "{model}path",
    "dtype": "{model}dtype",
    "max_num_seqs": "{engine}.max_sequences",
    "kv_cache_memory_bytes": "{engine}.kv_budget_bytes",
    "trust_remote_code": "none, because no code of a model folder is run",
    "enable_lora": "{adapters}",
}
"""Arguments of vLLM that other settings decide."""
_MM = "mm_processor_kwargs"


class VllmError(SkipVisionError):
    """vLLM cannot start, or does not answer any more."""


@dataclass(frozen=True)
class SettingNames:
    """How messages name the settings; by default as in the settings of a job.

    Attributes:
        engine: the section of the engine.
        model: what precedes the name of a field of the model.
        skip: the SkipConfig.
        adapters: the setting that names adapters.
        of_job: they are settings of a job, and not of the endpoint.
    """

    engine: str = "engine"
    model: str = "model."
    skip: str = "skip"
    adapters: str = "model.adapter"
    of_job: bool = True


OF_JOBS = SettingNames()


def check_settings(model: EngineModel, settings: BackendSection, names: SettingNames = OF_JOBS) -> None:
    """Raise `ConfigError`, listing every problem, for what vLLM cannot do; before weights are read.

    Args:
        model: the model.
        settings: with ``backend: vllm``.
        names: of the settings in messages.
    """
    engine, problems = names.engine, []
    if find_spec("vllm") is None:
        problems.append(
            f"{engine}.backend = vllm: vLLM is not installed here: pip install 'skipvision[vllm]'"
        )
    for name, near in _NATIVE.items():
        if getattr(settings, name) != type(settings).model_fields[name].default:
            problems.append(
                f"{engine}.{name} = {getattr(settings, name)}: only the native engine has it; for vLLM see "
                f"{engine}.engine_kwargs.{near}"
            )
    problems += [
        f"{engine}.engine_kwargs.{name}: this is decided by another setting: "
        + _OURS[name].format(engine=engine, model=names.model, adapters=names.adapters)
        for name in settings.engine_kwargs
        if name in _OURS
    ]
    if model.attention != "sdpa":
        problems.append(
            f"{names.model}attention = {model.attention}: vLLM has attention of its own; see "
            f"{engine}.engine_kwargs.attention_backend"
        )
    problems += _argument_problems(settings.engine_kwargs, names)
    problems += skip_problems(model, names.skip, engine, of_job=names.of_job)
    if problems:
        raise ConfigError("\n".join(problems))


def _argument_problems(given: Mapping[str, Any], names: SettingNames) -> Iterator[str]:
    base = f"{names.engine}.engine_kwargs"
    processor = given.get(_MM) or {}
    if not isinstance(processor, Mapping):
        yield f"{base}.{_MM} = {processor!r}: expected names with values"
    elif KEYWORD in processor:
        yield f"{base}.{_MM}.{KEYWORD}: set {names.skip} instead"
    if not isinstance(given.get(MAP_SKIPPED, False), bool):
        yield f"{base}.{MAP_SKIPPED} = {given[MAP_SKIPPED]!r}: expected true or false"


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


def engine_arguments(
    model: EngineModel, settings: BackendSection, dtype: str, further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments of vLLM's engine.

    Args:
        model: as `vllm_model` returned it.
        settings: of the engine.
        dtype: "float32", "bfloat16" or "auto".
        further: arguments that ``engine_kwargs`` may replace.
    """
    arguments: dict[str, Any] = {
        "model": model.base,
        "dtype": dtype,
        "max_num_seqs": settings.max_sequences,
        "kv_cache_memory_bytes": settings.kv_budget_bytes,
        **(further or {}),
        **settings.engine_kwargs,
    }
    arguments.pop(MAP_SKIPPED, None)  # `mapped` has applied it
    if skip := _skip_argument(model):
        arguments[_MM] = {**(arguments.get(_MM) or {}), KEYWORD: skip}
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


def check_arguments(
    model: EngineModel,
    settings: BackendSection,
    names: SettingNames = OF_JOBS,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Build vLLM's configuration without an engine.

    Where vLLM has no device, such as a head node, only the names of the arguments are checked.

    Args:
        model: without an adapter. No weights are read, so it may be one that has to be exported.
        settings: of the engine.
        names: of the settings in messages.
        further: as for `engine_arguments`.

    Raises:
        ConfigError: vLLM refuses the model or the settings.
    """
    configure_vllm()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    known = {field.name for field in fields(AsyncEngineArgs)}
    if unknown := sorted(settings.engine_kwargs.keys() - known - {MAP_SKIPPED}):
        raise ConfigError(
            "\n".join(f"{names.engine}.engine_kwargs.{name}: vLLM has no such argument" for name in unknown)
        )
    if not current_platform.device_type:
        return
    dtype = "auto" if model.dtype == "auto" else model.dtype
    arguments = engine_arguments(model, settings, dtype, further)
    try:
        AsyncEngineArgs(**arguments).create_engine_config()
    except Exception as error:  # vLLM, its plug-ins and pydantic raise errors of their own
        raise refusal(error, names) from error


def refusal(error: BaseException, names: SettingNames = OF_JOBS) -> ConfigError:
    """Return the error of a start of vLLM, with the innermost reason."""
    own: BaseException | None = error
    while own is not None and not isinstance(own, SkipVisionError):
        own = own.__cause__ or own.__context__
    text = str(own or error)
    if own is None and isinstance(error, ValidationError):
        text = "\n".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
    lines = [line for line in text.splitlines() if line.strip()]
    return ConfigError(
        f"{names.engine}.backend = vllm: vLLM refuses these settings: {' '.join(lines[:4])[:600]}"
    )
