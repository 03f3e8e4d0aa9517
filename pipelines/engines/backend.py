"""Create the configured engine: the library's own, or vLLM.

A job's processes share a `SharedEngine`. `open_engine` creates the one that the settings choose, and
`check_backend` refuses before Ray starts what the chosen one cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from pipelines.engines.config import BackendSection
from pipelines.engines.model import EngineModel, check_generation, load_engine
from pipelines.engines.thread import EngineThread, Outcome
from pipelines.engines.vllm.settings import OF_JOBS, SettingNames, check_arguments, check_settings
from pipelines.engines.vllm.threaded import VllmEngine
from skipvision.engine import Request, Statistics


def check_backend(model: EngineModel, settings: BackendSection, names: SettingNames = OF_JOBS) -> None:
    """Raise `ConfigError` for what the engine of the settings cannot do.

    vLLM checks the base model under the adapter's SkipConfig: that needs no merged weights.

    Args:
        model: the model, before `vllm_model`.
        settings: of the engine.
        names: of the settings in messages.
    """
    if settings.backend == "vllm":
        check_settings(model, settings, names)
        check_arguments(replace(model, adapter=None), settings, names)
    else:
        check_generation(model.base)


class SharedEngine(Protocol):
    """One engine for many threads, whose requests share its batches."""

    def wait_until_ready(self) -> None:
        """Wait until the engine can answer. Raise the error of its start if it failed."""

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests and wait until all have ended; results come in the order of the requests."""

    def statistics(self) -> Statistics:
        """Return the engine's counters since it started."""

    def stop(self) -> None:
        """End the engine and drop its running requests."""


def open_engine(
    model: EngineModel,
    settings: BackendSection,
    device: torch.device,
    died: Callable[[BaseException], None],
) -> SharedEngine:
    """Create the engine that the settings choose.

    Args:
        model: what it runs; for vLLM as `vllm_model` returned it.
        settings: of the engine.
        device: of its weights; vLLM uses all GPUs that the process sees.
        died: called when an engine in a process of its own has died, before waiting threads get the error.
    """
    if settings.backend == "vllm":
        return VllmEngine(model, settings, died)
    return EngineThread(lambda: load_engine(model, settings, device))
