"""The HTTP side: OpenAI's chat completions over the engines."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from transformers import AutoConfig

import skipvision as sv
from pipelines.engines.loading import load_processor
from serve.chat import request as asked
from serve.chat.response import Answer
from serve.chat.schemas import ChatRequest
from serve.chat.vocabulary import Vocabulary
from serve.config import ServeConfig
from serve.errors import DeadlineError
from serve.media.fetch import EncodedImage, MediaFetcher
from serve.observe.journeys import Journey, Journeys
from serve.observe.tracing import Tracer
from serve.problem import Problem
from serve.replica.liveness import running, still
from serve.replica.replica import Served, State, Work
from serve.reporting import problem_of, reported
from serve.sse import event
from skipvision.analysis import patches_of
from skipvision.engine import BASE, Chunk, Completion, Sampling
from skipvision.engine import Request as EngineRequest
from skipvision.errors import ConfigError, SkipVisionError
from skipvision.plan import TokenPlan

_TRIES = 3
"""Engines that a request is given to, one after the other, if they die before a word was sent."""

GRACE_SECONDS = 2.0
"""Beyond a request's time, at whose end the engine hands over what it has: then no engine answers."""

_QUESTION_SECONDS = 2.0
"""For what an engine says of itself."""

_SLOW_SECONDS = 5.0
"""A step that takes longer is told of: the engine may hang."""


@dataclass(frozen=True)
class Target:
    """What the name of a model means.

    Attributes:
        number: of the model in the settings.
        adapter: name, or None for the base model.
    """

    number: int
    adapter: str | None


class Ingress:
    """Answers HTTP requests.

    Args:
        config: settings of the deployment.
        engines: a handle for each of ``config.models``.
    """

    def __init__(self, config: ServeConfig, *engines: Any) -> None:
        self._config = config
        # Straight to the engine's process and back, without Ray's object store in between.
        self._engines = [engine.options(_by_reference=False) for engine in engines]
        self._targets = {name: Target(*where) for name, where in config.served().items()}
        self._processors: list[Any] = [load_processor(model.path) for model in config.models]
        self._vocabularies = [Vocabulary(processor) for processor in self._processors]
        self._models = [AutoConfig.from_pretrained(model.path) for model in config.models]
        texts = [model.get_text_config() for model in self._models]
        self._positions = [getattr(text, "max_position_embeddings", None) or 2**31 for text in texts]
        self._served: dict[int, Served] = {}
        self._began = int(time.time())
        self._media = MediaFetcher(config.media)
        tracer = Tracer(config.traces, f"{config.name}-ingress")
        self._threads = ThreadPoolExecutor(config.limits.prepare_threads, thread_name_prefix="prepare")
        self._journeys = Journeys(tracer, config.limits.request_seconds)

    async def close(self) -> None:
        """Leave nothing behind."""
        await self._media.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._journeys.tracer.close()

    # ----------------------------------------------------------------------------------------- routes

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """Write an answer to messages with images."""
        with contextlib.ExitStack() as while_answering:
            target = self._target(body.model)
            journey = while_answering.enter_context(self._journey(body.model, http, "chat"))
            work = await self._work(body, target, journey)
            answer = self._answer(body, target)
            if not body.stream:
                with _blamed_on_skip(body):
                    completion: Completion = await self._asked("answer", target, journey, work, GRACE_SECONDS)
                if completion.error is not None:
                    raise completion.error
                journey.arrived(completion)
                return JSONResponse(answer.completion(completion), headers=journey.headers)
            chunks = self._chunks(work, target, journey)
            # What is wrong with a request shows before its first token, when a status can still say it.
            with _blamed_on_skip(body):
                first = await anext(chunks)
            journey.spoke()
            told = self._told(answer, first, chunks, body, journey, while_answering.pop_all())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(told, media_type="text/event-stream", headers=headers)

    async def overlay(self, body: ChatRequest, http: Request) -> dict[str, Any]:
        """What becomes of the patches of each of the messages' images."""
        target = self._target(body.model)
        with self._journey(body.model, http, "overlay") as journey:
            request = await self._request(body, target, journey)
            if not request.images:
                raise Problem(400, "no image: an overlay is of the images in messages", param="messages")
            sizes = [image.size for image in request.images]
            # One token of an answer: the limits are those of requests that have one.
            request = replace(request, prompt="", images=(), sampling=Sampling(max_new_tokens=1))
            work = Work(request, _unix(journey.until))
            with _blamed_on_skip(body):
                plan: TokenPlan = await self._asked("plan", target, journey, work)
        overlays = patches_of(
            plan,
            request.inputs or {},
            sizes,
            self._processors[target.number],
            self._models[target.number],
        )
        data = [{"object": "overlay", **overlay.as_json()} for overlay in overlays]
        return {"object": "list", "model": body.model, "data": data}

    async def models(self) -> dict[str, Any]:
        """Models and adapters that requests can name."""
        return {"object": "list", "data": [self._card(name) for name in self._targets]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them, with the SkipConfig that it runs under; where no engine says it, as settings do."""
        target = self._target(name)
        section, adapter = self._config.models[target.number], target.adapter
        source, skip = section.path if adapter is None else section.adapters[adapter], self._skip(target)
        served = await self._offered(target.number)
        if served is not None:
            if adapter in served.missing:
                why = served.missing[adapter]
                return {**self._card(name), "source": source, "skip": None, "not_loaded": why}
            source, skip = served.adapters.get(adapter or BASE, source), skip or served.skip[adapter or BASE]
        return {**self._card(name), "source": source, "skip": skip}

    async def _offered(self, number: int) -> Served | None:
        """What an engine offers; while none has time to say it, what one said before."""
        if not await self._idle(number):
            with contextlib.suppress(
                TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError
            ):
                async with asyncio.timeout(_QUESTION_SECONDS):
                    self._served[number] = await self._engines[number].served.remote()
        return self._served.get(number)

    async def health(self) -> JSONResponse:
        """Whether every model has an engine that answers; one that starts on demand may have none.

        Without an adapter that cannot be had yet an engine is well: others would not have it, either.
        """
        found = await asyncio.gather(*(self._health(number) for number in range(len(self._engines))))
        models = {model.served_name: state for model, state in zip(self._config.models, found, strict=True)}
        well = all(state["status"] != "down" for state in found)
        return JSONResponse({"status": "ok" if well else "down", "models": models}, 200 if well else 503)

    # ------------------------------------------------------------------------------- from HTTP to work

    def _journey(self, model: str, http: Request, name: str) -> AbstractContextManager[Journey]:
        return self._journeys.begin(model, http.scope["arrived"], http.headers.get("traceparent"), name)

    def _target(self, name: str) -> Target:
        target = self._targets.get(name)
        if target is None:
            raise Problem(
                404,
                f"the model {name!r} does not exist; there are {', '.join(self._targets)}",
                param="model",
                code="model_not_found",
            )
        return target

    async def _work(self, body: ChatRequest, target: Target, journey: Journey) -> Work:
        """Everything that needs no engine: what is asked for, and how its answer is written."""
        asked.refuse_unsupported(body)
        schema = asked.schema(body)
        request = await self._request(body, target, journey)
        prompt = 0 if request.inputs is None else request.inputs["input_ids"].shape[1]
        room = self._positions[target.number] - prompt
        sampling = asked.sampling(body, self._config.limits.max_new_tokens, room)
        rows = self._config.models[target.number].engine.max_sequences
        if sampling.n > rows:
            raise Problem(400, f"n={sampling.n}: at most {rows} here", param="n", code="invalid_value")
        bare = replace(request, prompt="", images=(), sampling=sampling)
        return Work(bare, _unix(journey.until), schema, journey.span.traceparent)

    async def _request(self, body: ChatRequest, target: Target, journey: Journey) -> EngineRequest:
        """What is asked about: images fetched, templates filled in."""
        limits, vocabulary = self._config.limits, self._vocabularies[target.number]
        asked.refuse_too_long(body, vocabulary, self._positions[target.number])
        messages, urls = asked.conversation(body, vocabulary)
        if len(urls) > limits.images:
            raise Problem(
                400, f"{len(urls)} images; at most {limits.images} in one request", param="messages"
            )
        async with _in_time(journey.until):
            with journey.stage("media"):
                pictures = await self._pictures(urls)
            request = EngineRequest(messages, skip=self._skip_of(body, target), adapter=target.adapter)
            with journey.stage("prepare"):
                # Images in these threads only: what is decoded at once has to fit into memory.
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads if pictures else None,
                    asked.prepared,
                    self._processors[target.number],
                    request,
                    pictures,
                )

    async def _pictures(self, urls: Mapping[str, str]) -> dict[str, EncodedImage]:
        """The images of a request by the fields that name them, none decoded yet."""

        async def fetch(param: str, url: str) -> EncodedImage:
            with asked.blamed_on(param):
                return await self._media.fetch(url)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {param: group.create_task(fetch(param, url)) for param, url in urls.items()}
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        pictures = {param: task.result() for param, task in tasks.items()}
        pixels, most = sum(math.prod(each.size) for each in pictures.values()), self._config.limits.pixels
        if pixels > most:
            message = (
                f"images of {pixels:,} pixels; at most {most:,} in one request: send fewer or smaller ones"
            )
            raise Problem(400, message, param="messages", code="media_too_large")
        return pictures

    def _skip_of(self, body: ChatRequest, target: Target) -> sv.SkipConfig | Literal["full"] | None:
        """That of a request. The base model's summaries are as settings say, unless the request says it."""
        own, asked_for = self._skip(target), body.skip
        if not isinstance(asked_for, sv.SkipConfig):
            return asked_for or own
        if target.adapter is not None or "summary_tokens" in asked_for.model_fields_set:
            return asked_for
        return asked_for.model_copy(update={"summary_tokens": own.summary_tokens if own else 0})

    def _skip(self, target: Target) -> sv.SkipConfig | None:
        """The SkipConfig that the settings give the base model."""
        return self._config.models[target.number].skip if target.adapter is None else None

    def _answer(self, body: ChatRequest, target: Target) -> Answer:
        return Answer(
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            body.model,
            self._vocabularies[target.number],
            bool(body.logprobs),
        )

    # ------------------------------------------------------------------------------ from work to words

    async def _asked(
        self, method: str, target: Target, journey: Journey, work: Work, grace: float = 0.0
    ) -> Any:
        """What an engine says of a request; another one is asked if it dies over it."""
        ask = getattr(self._engines[target.number], method).remote
        for last in (*[False] * (_TRIES - 1), True):
            try:
                async with _in_time(journey.until + grace):
                    found = await ask(work)
                break
            except RayActorError:
                if last:
                    raise
                journey.retried()
        if isinstance(found, SkipVisionError):
            raise found
        return found

    async def _chunks(self, work: Work, target: Target, journey: Journey) -> AsyncIterator[Chunk]:
        """The answer in pieces. Another engine takes over only as long as nothing has been sent."""
        engine, sent = self._engines[target.number].options(stream=True), False
        for last in (*[False] * (_TRIES - 1), True):
            items = engine.stream.remote(work)
            try:
                while (item := await _next(items, journey.until + GRACE_SECONDS)) is not None:
                    if isinstance(item, SkipVisionError):
                        raise item
                    sent = True
                    yield item
                return
            except RayActorError:
                if sent or last:
                    raise
                journey.retried()
            finally:
                with contextlib.suppress(BackPressureError):  # which it raises once more
                    items.cancel()

    async def _told(
        self,
        answer: Answer,
        first: Chunk,
        chunks: AsyncIterator[Chunk],
        body: ChatRequest,
        journey: Journey,
        held: contextlib.ExitStack,
    ) -> AsyncIterator[str]:
        """The answer as server-sent events; an error in the middle is an event, too."""
        options = body.stream_options
        with held:
            for opening in answer.opening(body.n or 1):
                yield event(opening)
            try:
                async for chunk in _again(first, chunks):
                    done = chunk.completion
                    if done is not None:
                        journey.arrived(done)
                        if done.error is not None:
                            raise done.error
                    said = answer.chunk(chunk)
                    if said is not None:
                        yield event(said)
                    if done is not None and options is not None and options.include_usage:
                        yield event(answer.ending(done.usage))
            except Exception as error:
                problem = reported(error)
                journey.error = problem.kind
                yield event(problem.body())
            yield event("[DONE]")

    # ------------------------------------------------------------------------------------------- others

    def _card(self, name: str) -> dict[str, Any]:
        target = self._targets[name]
        model = self._config.models[target.number]
        parent = None if target.adapter is None else model.served_name
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "skipvision",
            "parent": parent,
        }

    async def _health(self, number: int) -> dict[str, Any]:
        handle = self._engines[number]
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                if await self._idle(number):
                    return {"status": "idle"}
                found: State = await handle.state.remote()
        except (BackPressureError, TimeoutError) as error:
            # Those that are full have no room for this question; nor have those that hang.
            where = ray_serve.get_replica_context().app_name, handle.deployment_name
            seconds, engines = await asyncio.gather(
                still(*where, _QUESTION_SECONDS), asyncio.to_thread(running, *where)
            )
            if not seconds:
                return {"status": "down", "reason": type(error).__name__}
            told = {"engines": engines, "answering": len(seconds)}
            if min(seconds) > _SLOW_SECONDS:
                return {"status": "slow", **told, "seconds": round(min(seconds), 1)}
            return {"status": "saturated", **told}
        except Exception as error:
            return {"status": "down", "reason": type(error).__name__}
        now, missing = found.statistics, {"not_loaded": found.missing} if found.missing else {}
        return {"status": "ok", "running": now.running, "waiting": now.waiting, **missing}

    async def _idle(self, number: int) -> bool:
        """A model that starts on demand has no engine now; to ask it anything would start one."""
        if self._config.models[number].scaling.min_engines:
            return False
        application = ray_serve.get_replica_context().app_name
        return not await asyncio.to_thread(running, application, self._engines[number].deployment_name)


async def _again(first: Chunk, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in chunks:
        yield chunk


async def _next(items: Any, until: float) -> Chunk | SkipVisionError | None:
    """The next of them, or None behind the last.

    Of each by itself: the first is waited for in another task than the others, and a timeout ends its own.
    """
    async with _in_time(until):
        item: Chunk | SkipVisionError | None = await anext(items, None)
    return item


@contextlib.contextmanager
def _blamed_on_skip(body: ChatRequest) -> Iterator[None]:
    """An engine that refuses a SkipConfig does not know where it is from: the request's own is its `skip`."""
    try:
        yield
    except ConfigError as error:
        if body.skip is None:
            raise
        raise Problem(400, str(error), param="skip", code="invalid_value") from error


@contextlib.asynccontextmanager
async def _in_time(until: float) -> AsyncIterator[None]:
    """Raise `DeadlineError` at that time (`time.monotonic`)."""
    try:
        async with asyncio.timeout_at(until):
            yield
    except TimeoutError as error:
        raise DeadlineError from error
    except (BackPressureError, DeploymentUnavailableError) as error:
        # Ray Serve puts handlers of its own for these before ours, which answer in plain text.
        raise problem_of(error) from error


def _unix(when: float) -> float:
    """A time of this process's clock as others read it."""
    return when - time.monotonic() + time.time()
