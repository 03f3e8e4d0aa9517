"""Load models, configs and processors of Hugging Face. No other file of the project does.

A model folder may carry Python code (``auto_map`` in its JSON files), and pickled weights can run code, too.
Without ``trust_remote_code=False`` transformers prompts on standard input whether it may run a folder's code.
These functions pass it, and read weights from safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    __version__,
)
from transformers.utils.hub import cached_file

from skipvision.errors import ConfigError
from skipvision.files import check_entries

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_LOAD_ERRORS = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, SafetensorError)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CODE = "trust_remote_code"
"""Every refusal of transformers to run remote code names this argument."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A model on the Hugging Face hub: ``owner/name``."""

NO_IMAGE_MODEL = "is not the config of an image-text-to-text model"


def load_config(path: str | Path) -> PretrainedConfig:
    """Load the config of a model.

    Args:
        path: folder or Hugging Face id.

    Raises:
        ConfigError: it cannot be loaded, or only with code from the folder.
    """
    with _config_errors(path):
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        except ValueError as error:
            if "Unrecognized model" in str(error):
                _check_own_code(path, PretrainedConfig.get_config_dict(str(path))[0])
            raise
        _check_kernels(path, PretrainedConfig.get_config_dict(str(path))[0])
    return config


def load_processor(path: str | Path) -> ProcessorMixin:
    """Load the processor that is stored with a model.

    Raises:
        ConfigError: it cannot be loaded, or only with code from the folder.
    """
    with _config_errors(path):
        processor: ProcessorMixin = AutoProcessor.from_pretrained(str(path), trust_remote_code=False)
    return processor


def load_model(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load an image-text-to-text model with its weights.

    Args:
        path: folder or Hugging Face id.
        options: further arguments of ``from_pretrained``: ``dtype``, ``attn_implementation`` …

    Raises:
        ConfigError: it cannot be loaded, or only with code from the folder, or its weights are pickled.
    """
    with _config_errors(path):
        names = [file.name for file in Path(path).iterdir()] if Path(path).is_dir() else []
    if names:
        check_weights(path, names)
    load_config(path)
    with _config_errors(path):
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            str(path), trust_remote_code=False, use_safetensors=True, **options
        )
    return model


def find_file(path: str | Path, name: str) -> Path:
    """Return one file of a model folder, or of the hub, which is then in the hub's cache.

    Args:
        path: folder or Hugging Face id.
        name: of the file, relative to the folder.

    Raises:
        ConfigError: there is no such file.
    """
    with _config_errors(path):
        return Path(str(cached_file(str(path), name)))


def build_model(config: PretrainedConfig, **options: Any) -> Any:
    """Build an image-text-to-text model with random weights from its config.

    Raises:
        ConfigError: the model can only be built with code from the folder of its config, or the config is of
            no image-text-to-text model.
        ValueError: the config does not support the options.
    """
    name = config.name_or_path or type(config).__name__
    with _remote_code_refused(name):
        try:
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                config, trust_remote_code=False, **options
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ConfigError(
                f"{name}: {type(config).__name__} {NO_IMAGE_MODEL} of transformers {__version__}"
            ) from None
    return model


def check_folder(folder: Path) -> None:
    """Check a model folder in a second, without loading weights.

    Raises:
        ConfigError: it has no config, its weights are missing, damaged or pickled, or its config or processor
            cannot be loaded without code from the folder.
    """
    with _config_errors(folder):
        has_config, names = (folder / "config.json").is_file(), [file.name for file in folder.iterdir()]
    if not has_config:
        raise ConfigError(f"{folder}: this folder holds no model, because it has no config.json")
    check_weights(folder, names)
    config = load_config(folder)
    if getattr(config, "auto_map", None):
        with torch.device("meta"), _config_errors(folder):
            build_model(config)
    load_processor(folder)


def check_weights(path: str | Path, names: list[str]) -> None:
    """Raise `ConfigError` if weights are pickled, or those of a folder are missing, damaged or outside of it.

    Only the headers of the weights are read.

    Args:
        path: folder or Hugging Face id, for the message; the index of the weights is read from a folder.
        names: the names of its files.
    """
    pickled = sorted(name for name in names if name.endswith(_PICKLES) and name != "training_args.bin")
    if pickled and not any(name.endswith((".safetensors", _INDEX)) for name in names):
        raise ConfigError(
            f"{path}: the weights are pickled ({pickled[0]}), and loading a pickle can run code: convert "
            "them to safetensors (save_pretrained of transformers writes it)"
        )
    index = Path(path, _INDEX)
    if not index.is_file():
        if Path(path).is_dir():
            _check_single_file(Path(path), names)
        return
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {_INDEX} cannot be read ({type(error).__name__}: {error})") from error
    for name in files:
        if not isinstance(name, str) or not name.endswith(".safetensors") or name != PurePosixPath(name).name:
            raise ConfigError(
                f"{path}: {_INDEX} names {name!r}: weights must be .safetensors files of the same folder"
            )
    for name in files:
        _check_header(Path(path, name))


def _check_single_file(folder: Path, names: list[str]) -> None:
    if _WEIGHTS in names:
        _check_header(folder / _WEIGHTS)
    elif not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{folder}: this folder has no weights ({_WEIGHTS}, or several files with {_INDEX}): copy them "
            "there"
        )


def _check_header(file: Path) -> None:
    """Raise `ConfigError` if a file of weights is missing, damaged or cut off. Its tensors are not read."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = f"{file.name} does not exist" if isinstance(error, FileNotFoundError) else None
        if reason is None:
            reason = _reason(error) if isinstance(error, OSError) else f"{file.name} is damaged ({error})"
        raise ConfigError(f"{file.parent}: {reason}: copy the model again") from error


def _check_own_code(path: str | Path, config: Any) -> None:
    """Raise `ConfigError` if any part of a config names code of its folder (``auto_map``)."""
    if not isinstance(config, dict):
        return
    if config.get("auto_map"):
        raise _never_run(path)
    for part in config.values():
        _check_own_code(path, part)


def _check_kernels(path: str | Path, config: Any) -> None:
    """Raise `ConfigError` if a config names a repository of kernels: they are downloaded code."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_kernels(path, value)
        if name.endswith("_implementation") and "/" in json.dumps(value):
            raise ConfigError(
                f"{path}: its config takes {name.strip('_')} from the repository {value!r}, whose code is "
                "never run: remove this entry from config.json"
            )


@contextmanager
def _config_errors(path: str | Path) -> Iterator[None]:
    """Turn what transformers raises about damaged or foreign files into a `ConfigError` with the path."""
    try:
        if Path(path).is_dir():
            check_entries(path)
        else:
            _check_on_hub(path)
        with _remote_code_refused(path):
            yield
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        raise ConfigError(f"{path}: {_reason(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: its files are nested too deeply") from error


def _check_on_hub(path: str | Path) -> None:
    """Raise `ConfigError` for a folder that does not exist.

    ``models/mine`` could also be a model on the hub: it is a folder if there is a folder ``models``.
    """
    folder = Path(path)
    is_path = folder.parent != Path() and folder.parent.is_dir()
    if not folder.exists() and (is_path or not HUB_ID.fullmatch(str(path))):
        raise ConfigError(
            f"{path}: there is no such folder: give the folder of a model, or its Hugging Face id"
        )


def _reason(error: Exception) -> str:
    """Return the reason of a system's error with the remedy, and the words of any other error."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        remedy = "make it readable" if isinstance(error, PermissionError) else "remove or replace it"
        return f"{error.filename} cannot be read: {error.strerror}; {remedy}"
    text, *listed = re.split(r"(?:Model type s|S)hould (?:be|contain) one of", str(error).strip(), maxsplit=1)
    if listed:  # a list of all that transformers has
        return f"{text.strip()} Choose a model that transformers {__version__} supports"
    return text or type(error).__name__


@contextmanager
def _remote_code_refused(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        if _CODE not in str(error):
            raise
        raise _never_run(path) from error


def _never_run(path: str | Path) -> ConfigError:
    return ConfigError(
        f"{path}: this model needs Python code from its own folder (auto_map), and such code is never "
        f"run: choose a model that transformers {__version__} supports itself"
    )
