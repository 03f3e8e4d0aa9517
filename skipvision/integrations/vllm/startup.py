"""Adapt vLLM's configuration before anything is built from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, UnsupportedModelError
from skipvision.exporting.read import exported_settings
from skipvision.integrations.vllm.settings import KEYWORD, Positions, Settings, merged
from skipvision.integrations.vllm.structure import why_not_pruned

RESOLVED = "skip_vision_settings"
"""Attribute of the model's config that holds `Settings.as_json` in all processes of vLLM."""
_SHARED = "mrope_section"
"""Attribute by which vLLM decides on buffers for several position axes."""
_UNSCALED = ("default", "linear", "llama3")
"""Kinds of RoPE whose angles do not depend on the number of positions."""

logger = logging.getLogger("vllm.skipvision")


@dataclass(frozen=True)
class VllmFamily:
    """How a model class of vLLM departs from the common case.

    Attributes:
        mrope: its decoder has M-RoPE.
        views: its visual tokens are ordered by view.
        towers: the only values of ``vision_config.model_type`` that are tested; empty = all.
        any_model: it runs any model of transformers, so what it can prune depends on the model.
    """

    mrope: bool = False
    views: bool = False
    towers: tuple[str, ...] = ()
    any_model: bool = False


def settings_of(hf_config: Any) -> Settings:
    """Return the settings that start-up left in a model's config."""
    return Settings.from_json(getattr(hf_config, RESOLVED))


def hook(family: VllmFamily, before: type[VerifyAndUpdateConfig] | None) -> type[VerifyAndUpdateConfig]:
    """Return a hook of a model class that runs after the one it has already."""
    earlier = before or VerifyAndUpdateConfig

    class SkipVisionConfig(earlier):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            earlier.verify_and_update_model_config(model_config)
            resolve(model_config, family)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            earlier.verify_and_update_config(vllm_config)
            restrict(vllm_config)

    return SkipVisionConfig


def refusal(
    architecture: str, supported: list[str], before: type[VerifyAndUpdateConfig] | None
) -> type[VerifyAndUpdateConfig]:
    """Return a hook of a model class without a tested path: it raises if Skip-Vision is configured."""
    earlier = before or VerifyAndUpdateConfig

    class WithoutSkipVision(earlier):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            earlier.verify_and_update_model_config(model_config)
            exported = exported_settings(model_config.hf_config)
            configured = exported is not None and exported.skip is not None and not exported.skip.is_full
            if configured or _server_value(model_config) is not None:
                raise UnsupportedModelError(
                    f"the vLLM plug-in of Skip-Vision does not support {architecture}; it supports "
                    f"{', '.join(supported)}. Start vLLM with --model-impl transformers, which can prune "
                    "images of further models, use skipvision.Engine, or start vLLM with VLLM_PLUGINS='' to "
                    "run the model with full tokens",
                    "not supported by the vLLM plug-in",
                )

    return WithoutSkipVision


def resolve(model_config: Any, family: VllmFamily) -> None:
    """Resolve the server's settings, and leave them in the model's config.

    Raises:
        ConfigError: a setting is invalid, or vLLM cannot run it.
        AdapterError: the entry of an exported model is damaged.
    """
    hf_config, mm_config = model_config.hf_config, model_config.multimodal_config
    if mm_config is None or getattr(hf_config, RESOLVED, None) is not None:
        return
    exported = exported_settings(hf_config)
    tuned = exported.skip if exported is not None and exported.skip is not None else SkipConfig.full()
    default, map_skipped = tuned, False
    value = _server_value(model_config)
    if value is not None:
        default, map_skipped = merged(tuned, value, False)
        # The rest goes to the model's processor, which does not know this key.
        mm_config.mm_processor_kwargs = {
            key: other for key, other in mm_config.mm_processor_kwargs.items() if key != KEYWORD
        }
    layer = tuned.summary_tokens or default.summary_tokens
    reason = _unsupported(model_config, family)
    positions: Positions = "own" if family.mrope else "shared" if _shares(model_config, default) else "none"
    if family.any_model and reason:
        positions = "none"
    settings = Settings(SkipConfig.full(), map_skipped, layer, positions, family.views)
    default = settings.checked(default, hf_config, map_skipped)
    if reason and not default.is_full:
        raise ConfigError(reason)
    settings = replace(settings, default=default, refused=reason)
    setattr(hf_config, RESOLVED, settings.as_json())
    if positions == "shared":
        # All three axes belong to one rotation: only the presence of the attribute matters.
        setattr(hf_config, _SHARED, [_rotated(model_config) // 2, 0, 0])
    if not default.is_full:
        logger.info("Skip-Vision prunes images: %s; positions: %s", default, positions)


def restrict(vllm_config: Any) -> None:
    """Turn pruning off where another setting of the server contradicts it.

    Raises:
        ConfigError: pruning is the server's default.
    """
    hf_config = vllm_config.model_config.hf_config
    if getattr(hf_config, RESOLVED, None) is None:
        return
    settings = settings_of(hf_config)
    reason = settings.refused or _contradiction(vllm_config, settings)
    if reason is None:
        if vllm_config.compilation_config.cudagraph_mm_encoder:
            logger.warning("Skip-Vision turns off cudagraph_mm_encoder: it would bypass pruning")
            vllm_config.compilation_config.cudagraph_mm_encoder = False
        tokens = vllm_config.scheduler_config.encoder_cache_size
        setattr(hf_config, RESOLVED, replace(settings, encoder_tokens=tokens).as_json())
        return
    if not settings.default.is_full:
        raise ConfigError(reason)
    logger.info("Skip-Vision refuses requests that prune images: %s", reason)
    if settings.positions == "shared":
        delattr(hf_config, _SHARED)
        settings = replace(settings, positions="none")
    setattr(hf_config, RESOLVED, replace(settings, refused=reason).as_json())


def _server_value(model_config: Any) -> object:
    mm_config = model_config.multimodal_config
    return ((mm_config and mm_config.mm_processor_kwargs) or {}).get(KEYWORD)


def _unsupported(model_config: Any, family: VllmFamily) -> str | None:
    if family.any_model:
        return why_not_pruned(model_config, mrope=model_config.uses_mrope)
    tower = getattr(getattr(model_config.hf_config, "vision_config", None), "model_type", None)
    if not family.towers or tower in family.towers:
        return None
    return (
        f"images of a vision tower {tower!r} cannot be pruned in vLLM: only {' and '.join(family.towers)} "
        "are supported in this family"
    )


def _contradiction(vllm_config: Any, settings: Settings) -> str | None:
    """Return why this server cannot prune images, or None if it can."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    carried = settings.positions != "none"
    if vllm_config.model_config.get_multimodal_config().is_multimodal_pruning_enabled():
        return "video_pruning_rate is set: vLLM's own pruning and Skip-Vision cannot both run. Set it to 0"
    if carried and parallel.pipeline_parallel_size > 1:
        other = "" if settings.positions == "own" else ", or positions='contiguous'"
        return (
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: only the first stage learns the "
            f"positions of pruned images. Use tensor_parallel_size{other}"
        )
    if carried and speculative is not None and speculative.method != "ngram":
        return (
            f"speculative decoding by {speculative.method!r} was not tested with pruned images: use 'ngram'"
        )
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        return "enable_tower_connector_lora counts the tower's tokens by those of the prompt: turn it off"
    return None


def _shares(model_config: Any, default: SkipConfig) -> bool:
    """Return whether a family with one axis can keep original positions on this server."""
    if default.positions == "contiguous" and not default.is_full:
        return False
    text = model_config.hf_text_config
    return set(_rope_kinds(getattr(text, "rope_parameters", None))) <= set(_UNSCALED)


def _rope_kinds(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [kind for value in parameters.values() for kind in _rope_kinds(value)]


def _rotated(model_config: Any) -> int:
    return int(model_config.get_head_size())
