"""Load base models and their processors, from a folder or by a Hugging Face id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, ProcessorMixin

from pipelines.engines.config import BaseModelSection
from skipvision import loading
from skipvision.anatomy.families import takes_images
from skipvision.errors import ConfigError

_HUB_SECONDS = 10


def usable_device() -> torch.device:
    """Return the GPU of this process if it has one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: for "auto", bfloat16 if the hardware multiplies it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})
    return torch.bfloat16 if native else torch.float32


def _cpu_flags() -> set[str]:
    """Return the CPU's feature flags; empty on systems without /proc/cpuinfo."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def check_known(path: str, field: str) -> None:
    """Check that a model exists, needs no code of its own and has no pickled weights.

    A model that is not here costs one request to the hub; transformers would send several for each file.

    Raises:
        ConfigError: naming the setting ``field``, a model that cannot be used.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if Path(path).is_dir():
        with _of_setting(field):
            loading.check_folder(Path(path))
    if Path(path).exists():
        return
    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        with _of_setting(field):
            loading.check_weights(path, [file.name for file in Path(cached).parent.iterdir()])
        return
    try:
        files = HfApi().model_info(path, timeout=_HUB_SECONDS).siblings or []
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{field} = {path}: neither a folder here nor a public model on the hub; check the spelling, or "
            "log in to the hub if the model is private"
        ) from None
    except HfHubHTTPError:  # a mirror may serve files but no model info
        return
    except Exception as error:  # the hub's library may use any HTTP client
        raise ConfigError(
            f"{field} = {path}: neither a folder here nor a model in the hub's cache, and the hub does not "
            f"answer ({error or type(error).__name__}); give the folder of a model"
        ) from None
    with _of_setting(field):
        loading.check_weights(path, [file.rfilename for file in files])


@contextmanager
def _of_setting(field: str) -> Iterator[None]:
    """Name the setting in front of an error that begins with its path."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{field} = {error}") from error


def load_base(path: str, dtype: torch.dtype | None, attention: str, device: torch.device) -> nn.Module:
    """Load a base model to a device, in its stored dtype if ``dtype`` is None.

    Raises:
        ConfigError: the model does not exist, or does not support these settings.
    """
    with _of_setting("model.path"):
        model: Any = loading.load_model(path, dtype=dtype or "auto", attn_implementation=attention)
    loaded: nn.Module = model.to(device)
    return loaded


def load_frozen(config: BaseModelSection, compute: torch.dtype, device: torch.device) -> nn.Module:
    """Load a base model for training or measuring; stored half-precision weights are cast to ``compute``."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model = load_base(config.path, dtype, config.attention, device)
    if dtype is None and next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
        model = model.to(compute)
    return model


def load_processor(path: str) -> ProcessorMixin:
    """Load the processor that is stored with a model. Raise `ConfigError` if that is not possible."""
    with _of_setting("model.path"):
        return loading.load_processor(path)


def load_config(path: str) -> PretrainedConfig:
    """Load the config of a model. Raise `ConfigError` if that is not possible."""
    with _of_setting("model.path"):
        return loading.load_config(path)


def empty_model(config: PretrainedConfig) -> nn.Module:
    """Build a model without weights (on the meta device).

    Raises:
        ConfigError: the model takes no images, or cannot be built.
    """
    if not takes_images(config):
        raise ConfigError(
            f"model.path = {config.name_or_path}: {type(config).__name__} takes no images: choose a "
            "vision-language model"
        )
    try:
        with torch.device("meta"), _of_setting("model.path"):
            return loading.build_model(config)
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"model.path = {config.name_or_path}: {error}") from error
