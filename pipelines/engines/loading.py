"""Base models and their processors, from a folder or a Hugging Face id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from pipelines.engines.config import BaseModelSection
from skipvision.errors import ConfigError

_HUB_SECONDS = 10


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: as told, or bfloat16 where the hardware multiplies it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})
    return torch.bfloat16 if native else torch.float32


def _cpu_flags() -> set[str]:
    """What the CPU says it can do; nothing where it is not asked the Linux way."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def check_known(path: str, field: str) -> None:
    """Raise `ConfigError` for a model that is neither here nor on the hub; ``field`` is the setting to name.

    The hub is asked once: transformers asks for each file, again and again.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise ConfigError(f"{field} = {path}: this folder holds no model, as it has no config.json")
    if Path(path).exists() or isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    try:
        HfApi().model_info(path, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{field} = {path}: there is no such folder, and no such model on the hub, or it is private; "
            "see the spelling, or log in to the hub"
        ) from None
    except HfHubHTTPError:  # a mirror that knows files only
        return
    except Exception as error:  # of whichever HTTP client the hub's library uses
        raise ConfigError(
            f"{field} = {path}: there is no such folder, no such model in the hub's cache, and the hub "
            f"does not answer ({error or type(error).__name__}); give the folder of a model"
        ) from None


def load_base(path: str, dtype: torch.dtype | None, attention: str, device: torch.device) -> nn.Module:
    """The base model on a device; ``dtype`` None = the one it is stored in.

    Raises:
        ConfigError: there is no such model, or it cannot be run so.
    """
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype or "auto", attn_implementation=attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path = {path}: {error}") from error
    placed: nn.Module = model.to(device)
    return placed


def load_frozen(config: BaseModelSection, compute: torch.dtype, device: torch.device) -> nn.Module:
    """The base model on a device, in its stored dtype, or as ``config.dtype`` says."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_base(config.path, dtype, config.attention, device)
    if dtype is None and next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
        model = model.to(compute)
    return model


def load_processor(path: str) -> ProcessorMixin:
    """The processor beside a model."""
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {path}: {error}") from error
    return processor
