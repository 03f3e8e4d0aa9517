"""OpenVINO GenAI, full tokens only: its own pruning changes nothing for LLaVA."""

from __future__ import annotations

import asyncio
import os
import platform
import threading
import time
import traceback
from importlib.metadata import version
from itertools import count
from queue import SimpleQueue
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image


class _OpenVino:
    """A thread that steps one pipeline, whose requests come through an inbox."""

    def __init__(self, options: dict[str, Any]) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(options["kv_gib"]))
        scheduler.max_num_seqs = options["max_sequences"]
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        hint = {"bfloat16": "bf16", "float32": "f32"}[options["dtype"]]
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint}
        if options["threads"]:
            properties["INFERENCE_NUM_THREADS"] = options["threads"]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            options["openvino_model"], scheduler_config=scheduler, device="CPU", properties=properties
        )
        self._numbers = count()
        self._inbox: SimpleQueue[tuple[Any, Any, asyncio.AbstractEventLoop]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    async def answer(self, image: str, prompt: str, tokens: int) -> float:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        config.set_eos_token_id(0)  # the model has none, but the pipeline needs one
        pixels = openvino.Tensor(np.asarray(Image.open(image).convert("RGB"))[None])
        loop = asyncio.get_running_loop()
        done: asyncio.Future[float] = loop.create_future()
        self._inbox.put(((prompt, [pixels], config), done, loop))
        return await done

    def _work(self) -> None:
        try:
            self._step_forever()
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the parent reports the log

    def _step_forever(self) -> None:
        running: list[list[Any]] = []
        while True:
            while not running or not self._inbox.empty():
                (prompt, images, config), done, loop = self._inbox.get()
                handle = self._pipeline.add_request(next(self._numbers), prompt, images, config)
                running.append([handle, config.max_new_tokens, 0, 0.0, done, loop])
            self._pipeline.step()
            now = time.perf_counter()
            for one in running:
                handle = one[0]
                while handle.can_read():
                    one[2] += sum(len(output.generated_ids) for output in handle.read().values())
                    one[3] = one[3] or now
            ended = [one for one in running if one[2] >= one[1]]
            running = [one for one in running if one[2] < one[1]]
            for _, _, _, first, done, loop in ended:
                loop.call_soon_threadsafe(done.set_result, first)


async def start(options: dict[str, Any]) -> _OpenVino:
    """Compile the model, and start the thread."""
    return _OpenVino(options)


def versions() -> str:
    """Describe the versions of this environment."""
    names = ("openvino", "openvino-genai", "optimum-intel")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])
