"""This project's engine, in the thread in which jobs and endpoint run it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from PIL import Image

import skipvision as sv
from benchmarks import _measure
from pipelines.engines.thread import EngineThread
from skipvision.engine import Chunk, Engine, Request, Sampling
from skipvision.loading import load_model, load_processor


class _Native:
    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._engine = EngineThread(self._make)
        self._processor = load_processor(options["model"])

    def _make(self) -> Engine:
        options = self._options
        load = load_model if options["skip"] is None else sv.from_exported
        model: Any = load(options["model"], dtype=options["dtype"])
        model.generation_config.eos_token_id = None
        skip = sv.SkipConfig.full() if options["skip"] is None else sv.SkipConfig(**options["skip"])
        return Engine(
            model.to(options["device"]),
            load_processor(options["model"]),
            skip,
            max_sequences=options["max_sequences"],
            kv_budget_bytes=int(options["kv_gib"] * 2**30),
        )

    async def ready(self) -> None:
        await asyncio.to_thread(self._engine.wait_until_ready)

    async def answer(self, image: str, prompt: str, tokens: int) -> float:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[float] = loop.create_future()
        first: list[float] = []

        def deliver(item: Chunk | BaseException) -> None:
            first.append(time.perf_counter())
            if isinstance(item, BaseException):
                loop.call_soon_threadsafe(done.set_exception, item)
            elif item.completion is not None:
                (choice,) = item.completion.choices
                if item.completion.error is None and len(choice.token_ids) == tokens:
                    loop.call_soon_threadsafe(done.set_result, first[0])
                else:
                    error = item.completion.error or RuntimeError(f"{choice} has not {tokens} tokens")
                    loop.call_soon_threadsafe(done.set_exception, error)

        request = Request(prompt, [Image.open(image)], sampling=Sampling(max_new_tokens=tokens))
        prepared = await asyncio.to_thread(sv.engine.prepare, self._processor, request)
        self._engine.submit(prepared, deliver)
        return await done


async def start(options: dict[str, Any]) -> _Native:
    """Load the model and start the engine."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    engine = _Native(options)
    await engine.ready()
    return engine


def versions() -> str:
    """Describe the versions of this environment."""
    return _measure.versions()
