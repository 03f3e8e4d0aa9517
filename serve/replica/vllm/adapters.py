"""The adapters that an engine of vLLM has loaded: vLLM applies LoRA of the language model, by request."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pipelines.engines.vllm.awaited import AsyncVllm
from serve.config import ModelSection
from serve.replica.vllm.settings import check_adapter
from skipvision import SkipConfig
from skipvision.adapters.files import PEFT_FILES
from skipvision.engine import BASE
from skipvision.errors import ConfigError


@dataclass
class LoadedAdapter:
    """One adapter, or the base model.

    Attributes:
        skip: its SkipConfig.
        lora: vLLM's request of the adapter; None = it has no LoRA.
        number: vLLM's number of the adapter.
        files: folder that vLLM reads it from; None without LoRA.
        requests: number of requests that use it now.
    """

    skip: SkipConfig
    lora: Any = None
    number: int = 0
    files: Path | None = None
    requests: int = 0


class VllmAdapters:
    """Loads adapters into an engine of vLLM.

    Args:
        engine: runs in ``loop``.
        section: the base model and its engine.
        skip: SkipConfig of the base model.
        loop: event loop of the engine. Other methods than `using` and `configs` are called in other threads.
    """

    def __init__(
        self, engine: AsyncVllm, section: ModelSection, skip: SkipConfig, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._engine, self._loop, self._numbers = engine, loop, count(1)
        self._section, self._loaded = section, {BASE: LoadedAdapter(skip)}

    @property
    def configs(self) -> dict[str, SkipConfig]:
        """The SkipConfig of the base model and of each adapter."""
        return {name: adapter.skip for name, adapter in self._loaded.items()}

    @contextmanager
    def using(self, name: str) -> Iterator[LoadedAdapter]:
        """Keep an adapter while a request uses it. Raise `ConfigError` if it is not loaded."""
        adapter = self._loaded.get(name)
        if adapter is None:
            raise ConfigError(f"there is no adapter {name!r}")
        adapter.requests += 1
        try:
            yield adapter
        finally:
            adapter.requests -= 1

    def names(self) -> Sequence[str]:
        """Return the names of the base model and of the loaded adapters."""
        return list(self._loaded)

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter.

        Raises:
            AdapterError: vLLM cannot serve it.
            ConfigError: vLLM refuses it.
        """
        adapter = LoadedAdapter(check_adapter(name, folder, self._section), number=next(self._numbers))
        if all((folder / file).exists() for file in PEFT_FILES):
            # vLLM may read an adapter again when it is used.
            adapter.files = Path(tempfile.mkdtemp(prefix="skipvision-lora-"))
            try:
                for file in PEFT_FILES:
                    shutil.copyfile(folder / file, adapter.files / file)
                adapter.lora = self._run(self._engine.add_lora(name, adapter.number, adapter.files))
            except BaseException:
                shutil.rmtree(adapter.files, ignore_errors=True)
                raise
        self._loaded = {**self._loaded, name: adapter}

    def remove(self, name: str) -> None:
        """Remove an adapter. Raise `ConfigError` while it has requests."""
        adapter = self._loaded[name]
        if adapter.requests:
            raise ConfigError(f"the adapter {name!r} has {adapter.requests} requests")
        self._loaded = {other: each for other, each in self._loaded.items() if other != name}
        if adapter.files is not None:
            self._run(self._engine.remove_lora(adapter.number))
            shutil.rmtree(adapter.files, ignore_errors=True)

    def close(self) -> None:
        """Remove the files of all adapters."""
        for adapter in self._loaded.values():
            if adapter.files is not None:
                shutil.rmtree(adapter.files, ignore_errors=True)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
