"""The HTTP replica: OpenAI's chat completions over the engines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve.chat.response import ChatResponse
from serve.chat.schemas import ChatRequest
from serve.config import ServeConfig
from serve.ingress.catalogue import Catalogue
from serve.ingress.dispatch import Engines, unix_time
from serve.ingress.health import Health
from serve.ingress.preparation import Preparer
from serve.media.fetch import MediaFetcher
from serve.observe.journeys import Journey, Journeys
from serve.observe.tracing import Tracer
from serve.problem import Problem
from serve.replica.messages import Work
from serve.reporting import reported
from serve.sse import event
from skipvision.analysis import patches_of
from skipvision.engine import Chunk, Sampling
from skipvision.errors import ConfigError

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Ingress:
    """Answers HTTP requests; `serve.ingress.routes` maps the routes to its methods.

    Args:
        config: settings of the deployment.
        handles: Ray Serve's handle of the engines of each of ``config.models``.
    """

    def __init__(self, config: ServeConfig, *handles: Any) -> None:
        engines = [
            Engines(handle, on_demand=model.scaling.min_engines == 0)
            for model, handle in zip(config.models, handles, strict=True)
        ]
        self.catalogue = Catalogue(config, engines)
        self.preparer = Preparer(config.limits, MediaFetcher(config.media))
        self.journeys = Journeys(
            Tracer(config.traces, f"{config.name}-ingress"), config.limits.request_seconds
        )
        models = {model.section.served_name: model for model in self.catalogue.models}
        self._health = Health(models, self.preparer)

    async def close(self) -> None:
        """Close connections, stop the threads, send the remaining spans."""
        await self.preparer.close()
        for model in self.catalogue.models:
            model.rendering.close()
        self.journeys.tracer.close()

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Answer messages with images, in one piece or as server-sent events."""
        target = self.catalogue.target(body.model)
        with contextlib.ExitStack() as until_sent:
            journey = until_sent.enter_context(self._journey(body, http, "chat"))
            work = await self.preparer.work(body, target, journey)
            response = ChatResponse.to(body, target.model.vocabulary)
            if not body.stream:
                with _blamed_on_skip(body):
                    completion = await target.model.engines.answer(work, journey)
                if completion.error is not None:
                    raise completion.error
                journey.finish(completion)
                return JSONResponse(response.completion(completion), headers=journey.headers)
            chunks = target.model.engines.stream(work, journey)
            # An engine refuses a request before its first token, while the HTTP status can still report it.
            with _blamed_on_skip(body):
                first = await anext(chunks)
            journey.mark_first_token()
            events = _events(response, _chain(first, chunks), body, journey, until_sent.pop_all())
        return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def overlay(self, body: ChatRequest, http: Request) -> dict[str, Any]:
        """Return the fate of each patch of the messages' images; generate nothing."""
        target = self.catalogue.target(body.model)
        with self._journey(body, http, "overlay") as journey:
            request = await self.preparer.request(body, target, journey)
            if not request.images:
                raise Problem(400, "an overlay needs an image in messages", param="messages")
            sizes = [image.size for image in request.images]
            # The limits on a prompt are those of a request for one token.
            request = replace(request, prompt="", images=(), sampling=Sampling(max_new_tokens=1))
            work = Work(request, unix_time(journey.until))
            with _blamed_on_skip(body):
                plan = await target.model.engines.plan(work, journey)
        model = target.model
        overlays = patches_of(plan, request.inputs or {}, sizes, model.processor, model.config)
        data = [{"object": "overlay", **overlay.as_json()} for overlay in overlays]
        return {"object": "list", "model": body.model, "data": data}

    async def models(self) -> dict[str, Any]:
        """List the models and adapters that requests can name."""
        return {"object": "list", "data": self.catalogue.cards()}

    async def model(self, name: str) -> dict[str, Any]:
        """Return one model's card, with its source and SkipConfig."""
        return await self.catalogue.details(name)

    async def health(self) -> JSONResponse:
        """Return the state of each model's engines; 503 if a model has none that responds."""
        report = await self._health.report()
        return JSONResponse(report, 200 if report["status"] == "ok" else 503)

    def _journey(self, body: ChatRequest, http: Request, name: str) -> AbstractContextManager[Journey]:
        return self.journeys.begin(body.model, http.scope["arrived"], http.headers.get("traceparent"), name)


async def _events(
    response: ChatResponse,
    chunks: AsyncIterator[Chunk],
    body: ChatRequest,
    journey: Journey,
    resources: contextlib.ExitStack,
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events, then release its resources. A late error is an event too."""
    options = body.stream_options
    with resources:
        for opening in response.opening(body.n or 1):
            yield event(opening)
        try:
            async for chunk in chunks:
                done = chunk.completion
                if done is not None:
                    journey.finish(done)
                    if done.error is not None:
                        raise done.error
                delta = response.chunk(chunk)
                if delta is not None:
                    yield event(delta)
                if done is not None and options is not None and options.include_usage:
                    yield event(response.usage(done.usage))
        except Exception as error:
            problem = reported(error)
            journey.error = problem.kind
            yield event(problem.body())
        yield event("[DONE]")


async def _chain(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in rest:
        yield chunk


@contextlib.contextmanager
def _blamed_on_skip(body: ChatRequest) -> Iterator[None]:
    """Raise an engine's `ConfigError` as a problem of the field ``skip`` if the request set that field."""
    try:
        yield
    except ConfigError as error:
        if body.skip is None:
            raise
        raise Problem(400, str(error), param="skip", code="invalid_value") from error
