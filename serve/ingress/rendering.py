"""Render a model's chat template for an ingress, one prompt at a time, without holding up other models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.engines.templates import TemplateProcess


class Rendering:
    """The chat template of one model, in a process and a thread of its own.

    Args:
        processor: the model's processor.
        seconds: limit on rendering one prompt (s).

    Attributes:
        requests: requests whose prompts are rendered now or wait for that.
    """

    def __init__(self, processor: Any, seconds: float) -> None:
        self._template = TemplateProcess(processor, seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="template")
        self.requests = 0

    @property
    def busy_seconds(self) -> float:
        """How long the prompt that is being rendered has taken so far; 0 if there is none (s)."""
        return self._template.busy_seconds

    async def text(self, messages: Sequence[Any]) -> str | None:
        """Return the text of messages; None if the model has no chat template.

        Raises:
            InputError: the template refuses the messages, does not end, or takes too much memory.
        """
        if not self._template.exists:
            return None
        self.requests += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._template.render, messages
            )
        finally:
            self.requests -= 1

    def close(self) -> None:
        """End the process and the thread that render."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._template.close()
