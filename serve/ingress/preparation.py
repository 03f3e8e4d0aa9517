"""Turn a chat completion's body into work for an engine: fetch images, apply the template, check limits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from serve.chat import request as chat
from serve.chat.schemas import ChatRequest
from serve.config import LimitSection
from serve.ingress.catalogue import Target
from serve.ingress.dispatch import deadline, unix_time
from serve.media.fetch import MediaFetcher
from serve.media.images import EncodedImage
from serve.observe.journeys import Journey
from serve.problem import Problem
from serve.replica.messages import Work
from skipvision.engine import Request


class Preparer:
    """Does everything for a request that needs no engine.

    Args:
        limits: of the deployment.
        media: fetches images by URL; closed by `close`.

    Attributes:
        threads: requests whose images are decoded at once.
        requests: requests whose images are decoded now or wait for that.
    """

    def __init__(self, limits: LimitSection, media: MediaFetcher) -> None:
        self._limits, self._media = limits, media
        self.threads, self.requests = limits.prepare_threads, 0
        self._threads = ThreadPoolExecutor(limits.prepare_threads, thread_name_prefix="prepare")

    async def close(self) -> None:
        """Close connections and stop the threads."""
        await self._media.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def work(self, body: ChatRequest, target: Target, journey: Journey) -> Work:
        """Return what an engine needs to answer a request. Raise `Problem` or `DeadlineError`."""
        chat.refuse_unsupported(body)
        schema = chat.schema(body)
        request = await self.request(body, target, journey)
        prompt = 0 if request.inputs is None else request.inputs["input_ids"].shape[1]
        room = target.model.max_positions - prompt
        sampling = chat.sampling(body, self._limits.max_new_tokens, room)
        rows = target.model.section.engine.max_sequences
        if sampling.n > rows:
            raise Problem(400, f"n={sampling.n}: n must be at most {rows}", param="n", code="invalid_value")
        request = replace(request, sampling=sampling)
        if request.inputs is not None:
            request = replace(request, prompt="", images=())
        least = chat.wanted_tokens(body) or 1
        return Work(request, unix_time(journey.until), schema, least, journey.span.traceparent)

    async def request(self, body: ChatRequest, target: Target, journey: Journey) -> Request:
        """Return the prompt: images fetched and processed, templates filled in, texts tokenized.

        vLLM processes images and tokenizes texts itself.
        """
        model = target.model
        chat.refuse_too_long(body, model.vocabulary, model.max_positions)
        messages, urls = chat.conversation(body, model.vocabulary)
        if len(urls) > self._limits.images:
            message = f"{len(urls)} images; at most {self._limits.images} in one request"
            raise Problem(400, message, param="messages")
        async with deadline(journey.until):
            with journey.stage("media"):
                images = await self.fetch(urls)
            request = Request(messages, skip=target.skip_for(body.skip), adapter=target.adapter)
            with journey.stage("prepare"):
                text = await model.rendering.text(messages)
                chat.refuse_too_long_text(text or "", model.vocabulary, model.max_positions)
                # Only these few threads decode images, so that all decoded pixels fit into memory.
                threads = self._threads if images else None
                self.requests += len(images) > 0
                try:
                    prepared = (
                        partial(chat.rendered, request, images, text)
                        if model.renders_itself
                        else partial(chat.prepared, model.processor, request, images, text)
                    )
                    return await asyncio.get_running_loop().run_in_executor(threads, prepared)
                finally:
                    self.requests -= len(images) > 0

    async def fetch(self, urls: Mapping[str, str]) -> dict[str, EncodedImage]:
        """Fetch images without decoding them. The first failure cancels the rest.

        Args:
            urls: by the field of the request that names each.

        Raises:
            Problem: an image cannot be fetched, or all of them together have too many pixels.
        """

        async def fetch(param: str, url: str) -> EncodedImage:
            with chat.blamed_on(param):
                return await self._media.fetch(url)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {param: group.create_task(fetch(param, url)) for param, url in urls.items()}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        images = {param: task.result() for param, task in tasks.items()}
        pixels, limit = sum(math.prod(image.size) for image in images.values()), self._limits.pixels
        if pixels > limit:
            message = (
                f"images of {pixels:,} pixels; at most {limit:,} in one request: send fewer or smaller ones"
            )
            raise Problem(400, message, param="messages", code="media_too_large")
        return images
