"""Whether vLLM prunes images here, and which SkipConfigs it cannot run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import entry_points

import skipvision as sv
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_config
from pipelines.engines.model import EngineModel
from pipelines.shared.console import say
from skipvision.errors import ConfigError
from skipvision.integrations.vllm.equal_cost import without_skipped
from skipvision.integrations.vllm.plugin import version_problem
from skipvision.integrations.vllm.settings import MAP_SKIPPED, Settings

_GROUP, _PLUGINS = "vllm.general_plugins", "VLLM_PLUGINS"


def pruning_problem() -> str | None:
    """Return why vLLM would run full tokens here; None = it loads the plug-in that prunes images."""
    ours = [entry.name for entry in entry_points(group=_GROUP) if entry.value.startswith("skipvision.")]
    if not ours:
        return (
            "vLLM prunes images by the plug-in of skipvision, which is not installed here: "
            "pip install 'skipvision[vllm]'"
        )
    named = os.environ.get(_PLUGINS)
    if named is not None and not set(ours) & set(named.split(",")):
        return f"{_PLUGINS}={named!r} turns off the plug-in that prunes images: add {ours[0]}, or unset it"
    return version_problem()


def skip_problems(model: EngineModel, name: str, engine: str, *, of_job: bool) -> Iterator[str]:
    """Yield why vLLM cannot run a model's SkipConfig.

    Args:
        model: the model.
        name: of the SkipConfig in messages.
        engine: name of the engine's section.
        of_job: they are settings of a job, and not of the endpoint.
    """
    skip = model.skip
    if skip.is_full:
        return
    if (problem := pruning_problem()) is not None:
        yield f"{name}: {problem}, or set {name} to full"
    if skip.skipped:
        equal = instead_of_skipped(skip, model.base, name, of_job=of_job)
        yield (
            f"{name}.skipped = {skip.skipped}: in vLLM no token can bypass the feed-forward networks: set "
            f"{equal}, or {engine}.engine_kwargs.{MAP_SKIPPED} to true, or use {engine}.backend native"
        )
    if skip.drop_after is not None:
        yield (
            f"{name}.drop_after = {skip.drop_after}: in vLLM all layers have the same tokens: set it "
            f"to null and calibrate or tune for that, or use {engine}.backend native"
        )
    if skip.size_bias:
        yield (
            f"{name}.size_bias = true: vLLM's paged attention takes no bias: set it to false and calibrate "
            f"or tune for that, or use {engine}.backend native"
        )
    # Positions, views and summary tokens depend on vLLM's class of the model, which is not known yet.
    rest = skip.model_copy(update={"skipped": 0, "drop_after": None, "size_bias": False})
    known = Settings(rest, summary_tokens=skip.summary_tokens, positions="shared", views=True)
    try:
        known.checked(rest, load_config(model.base), False)
    except ConfigError as error:
        yield f"{name}: {error}"


def instead_of_skipped(skip: sv.SkipConfig, base: str, name: str, *, of_job: bool = True) -> str:
    """Return the arguments of a command that set a SkipConfig of equal FLOPs without skipped tokens.

    Args:
        skip: with skipped tokens.
        base: folder or Hugging Face id of the model. The first call measures it, which takes seconds.
        name: of the SkipConfig on the command line.
        of_job: the command is a job, and not the endpoint.
    """
    before, between = ("--", " ") if of_job else ("", "=")
    equal = without_skipped(skip, load_config(base))
    if equal is None:
        return f"{before}{name}.skipped{between}0"
    defaults = sv.SkipConfig().model_dump()
    fields = {"retained": equal.retained, "skipped": 0}
    fields |= {field: value for field, value in equal.model_dump().items() if value != defaults[field]}
    given = (
        f"{before}{name}.{field}{between}{value if isinstance(value, str) else json.dumps(value)}"
        for field, value in fields.items()
    )
    return f"{' '.join(given)} (the same FLOPs)"


def mapped(model: EngineModel, settings: BackendSection) -> EngineModel:
    """Return a model for vLLM whose skipped tokens are replaced by retained ones of equal FLOPs.

    It is the model itself unless ``engine_kwargs.map_skipped`` is true and the model has skipped tokens.
    """
    equal = mapped_config(model.skip, model.base, settings)
    if equal == model.skip:
        return model
    say(
        f"{MAP_SKIPPED}: retained={equal.retained}, skipped=0 instead of retained={model.skip.retained}, "
        f"skipped={model.skip.skipped}"
    )
    return replace(model, skip=equal)


def mapped_config(skip: sv.SkipConfig, base: str, settings: BackendSection) -> sv.SkipConfig:
    """Return the SkipConfig that `mapped` gives a model; the first call for a model takes seconds.

    Args:
        skip: to be mapped.
        base: folder or Hugging Face id of the model.
        settings: of the engine.
    """
    if settings.engine_kwargs.get(MAP_SKIPPED) is not True or not skip.skipped:
        return skip
    return without_skipped(skip, load_config(base)) or skip
