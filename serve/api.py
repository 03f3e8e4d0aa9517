"""The HTTP side: OpenAI's chat completions over the engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import reprlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, cast

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from transformers import AutoConfig

import skipvision as sv
from pipelines.config import details, field_name
from pipelines.loading import load_processor
from serve import responses
from serve.answers import Answer, event
from serve.config import ServeConfig
from serve.errors import DeadlineError, MediaError
from serve.exposition import exposition
from serve.grammar import ANY_OBJECT
from serve.guard import Guard
from serve.journeys import Journey, Journeys
from serve.keys import KeyRing
from serve.media import EncodedImage, MediaFetcher
from serve.middleware import Around
from serve.page import page_routes
from serve.problems import Problem, problem_of, reported
from serve.replica import Served, Work
from serve.schemas import ChatRequest, ImagePart, TextPart
from serve.tracing import Tracer
from serve.vocabulary import Vocabulary
from skipvision.analysis import patches_of
from skipvision.engine import BASE, Chunk, Completion, Sampling, prepare
from skipvision.engine import Request as EngineRequest
from skipvision.errors import SkipVisionError

_TRIES = 3
"""Engines that a request is given to, one after the other, if they die before a word was sent."""

_UNSUPPORTED = (
    *("frequency_penalty", "presence_penalty", "logit_bias"),
    *("tools", "functions", "audio", "web_search_options"),
)
"""Fields that would change the answer, if they were not refused."""

GRACE_SECONDS = 10.0
"""Beyond a request's time, at whose end the engine hands over what it has: then no engine answers."""

_HEALTH_SECONDS = 2.0


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
        self._config, self._engines = config, engines
        self._targets = {name: Target(*where) for name, where in config.served().items()}
        self._processors: list[Any] = [load_processor(model.path) for model in config.models]
        self._vocabularies = [Vocabulary(processor) for processor in self._processors]
        self._models = [AutoConfig.from_pretrained(model.path) for model in config.models]
        texts = [model.get_text_config() for model in self._models]
        self._positions = [getattr(text, "max_position_embeddings", None) or 2**31 for text in texts]
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
                completion = await self._completion(work, target, journey)
                journey.arrived(completion)
                return JSONResponse(answer.completion(completion), headers=journey.headers)
            chunks = self._chunks(work, target, journey)
            # What is wrong with a request shows before its first token, when a status can still say it.
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
            plan = await self._asked("plan", target, journey, Work(request, _unix(journey.until)))
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

    async def model(self, name: str, http: Request) -> dict[str, Any]:
        """One of them, with the SkipConfig that it runs under; where no engine runs, as the settings say."""
        target = self._target(name)
        section, adapter = self._config.models[target.number], target.adapter
        source, skip = section.path if adapter is None else section.adapters[adapter], self._skip(target)
        if not await self._idle(target.number):
            with self._journey(name, http, "model") as journey:
                served: Served = await self._asked("served", target, journey)
            source, skip = served.adapters.get(adapter or BASE, source), skip or served.skip[adapter or BASE]
        return {**self._card(name), "source": source, "skip": skip}

    async def health(self) -> JSONResponse:
        """Whether every model has an engine that answers; one that starts on demand may have none."""
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
        _refuse_unsupported(body)
        schema = _schema(body)
        request = await self._request(body, target, journey)
        prompt = 0 if request.inputs is None else request.inputs["input_ids"].shape[1]
        room = self._positions[target.number] - prompt
        sampling = _sampling(body, self._config.limits.max_new_tokens, room)
        rows = self._config.models[target.number].engine.max_sequences
        if sampling.n > rows:
            raise Problem(400, f"n={sampling.n}: at most {rows} here", param="n", code="invalid_value")
        bare = replace(request, prompt="", images=(), sampling=sampling)
        return Work(bare, _unix(journey.until), schema, journey.span.traceparent)

    async def _request(self, body: ChatRequest, target: Target, journey: Journey) -> EngineRequest:
        """What is asked about: images fetched, templates filled in."""
        limits = self._config.limits
        messages, urls = _conversation(body, self._vocabularies[target.number])
        if len(urls) > limits.images:
            raise Problem(
                400, f"{len(urls)} images; at most {limits.images} in one request", param="messages"
            )
        async with _in_time(journey.until):
            with journey.stage("media"):
                pictures = await self._pictures(urls)
            request = EngineRequest(messages, skip=body.skip or self._skip(target), adapter=target.adapter)
            with journey.stage("prepare"):
                # In these threads only: what is decoded at once has to fit into memory.
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, _prepared, self._processors[target.number], request, pictures
                )

    async def _pictures(self, urls: Mapping[str, str]) -> dict[str, EncodedImage]:
        """The images of a request by the fields that name them, none decoded yet."""

        async def fetch(param: str, url: str) -> EncodedImage:
            with _blamed_on(param):
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

    async def _completion(self, work: Work, target: Target, journey: Journey) -> Completion:
        """The whole answer."""
        found: Completion = await self._asked("answer", target, journey, work)
        if found.error is not None:
            raise found.error
        return found

    async def _asked(self, method: str, target: Target, journey: Journey, *given: Work) -> Any:
        """What an engine says, of a request if one is given; another one is asked if it dies over it."""
        ask = getattr(self._engines[target.number], method).remote
        for last in (*[False] * (_TRIES - 1), True):
            try:
                async with _in_time(journey.until + GRACE_SECONDS):
                    found = await ask(*given)
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
                async with _in_time(journey.until + GRACE_SECONDS):
                    async for item in items:
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
            async with asyncio.timeout(_HEALTH_SECONDS):
                if await self._idle(number):
                    return {"status": "idle"}
                now = await handle.statistics.remote()
        except (BackPressureError, TimeoutError) as error:
            # Engines that run have no room for this question either; Ray Serve ends those that hang.
            if await asyncio.to_thread(_running, handle.deployment_name):
                return {"status": "saturated"}
            return {"status": "down", "reason": type(error).__name__}
        except Exception as error:
            return {"status": "down", "reason": type(error).__name__}
        return {"status": "ok", "running": now.running, "waiting": now.waiting}

    async def _idle(self, number: int) -> bool:
        """A model that starts on demand has no engine now; to ask it anything would start one."""
        if self._config.models[number].scaling.min_engines:
            return False
        return not await asyncio.to_thread(_running, self._engines[number].deployment_name)


# ------------------------------------------------------------------------------------ what is asked for


def _conversation(body: ChatRequest, vocabulary: Vocabulary) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Messages for the processor's template, and the URLs of their images in order, by field."""
    messages: list[dict[str, Any]] = []
    urls: dict[str, str] = {}
    for turn, message in enumerate(body.messages):
        content = message.content
        parts: list[TextPart | ImagePart]
        parts = [TextPart(type="text", text=content or "")] if not isinstance(content, list) else content
        said: list[dict[str, Any]] = []
        for place, part in enumerate(parts):
            if isinstance(part, ImagePart):
                urls[f"messages.{turn}.content.{place}.image_url.url"] = part.image_url.url
                said.append({"type": "image"})
            else:
                said.append({"type": "text", "text": vocabulary.harmless(part.text)})
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": said})
    return messages, urls


def _prepared(processor: Any, request: EngineRequest, pictures: Mapping[str, EncodedImage]) -> EngineRequest:
    """With the images, and ready for an engine."""
    images = []
    for param, picture in pictures.items():
        with _blamed_on(param):
            images.append(picture.open())
    return prepare(processor, replace(request, images=images))


@contextlib.contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    """Say of an image which field named it."""
    try:
        yield
    except MediaError as error:
        raise Problem(400, str(error), param=param, code=error.code) from error


def _refuse_unsupported(body: ChatRequest) -> None:
    """Raise for what cannot be done."""
    for name in _UNSUPPORTED:
        value = getattr(body, name)
        if value:
            raise Problem(
                400,
                f"{name}={reprlib.repr(value)} is not supported: leave it out",
                param=name,
                code="unsupported",
            )
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs without logprobs=true", param="top_logprobs", code="invalid_value")


def _schema(body: ChatRequest) -> str | None:
    """The JSON schema that the answer shall follow, as JSON."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None:
        message = "response_format of type json_schema without json_schema"
        raise Problem(400, message, param="response_format", code="invalid_value")
    return json.dumps(wanted.json_schema.schema_)


def _sampling(body: ChatRequest, most: int, room: int) -> Sampling:
    """How the answer is written; ``most`` tokens are allowed, ``room`` are left by the prompt."""
    asked = body.max_completion_tokens or body.max_tokens
    if asked is not None and asked > most:
        raise Problem(
            400, f"max_completion_tokens={asked}: at most {most} here", param="max_completion_tokens"
        )
    if (asked or 1) > room:
        message = (
            f"{asked or 1} tokens of answer, but the messages leave {max(room, 0)} of this model's positions"
        )
        raise Problem(400, f"{message}: shorten them", param="messages", code="context_length_exceeded")
    return Sampling(
        max_new_tokens=asked if asked is not None else min(most, room),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        seed=None if body.seed is None else body.seed % 2**63,
        stop=() if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
    )


async def _again(first: Chunk, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in chunks:
        yield chunk


def _running(deployment: str) -> int:
    """Replicas that run; a call would start one where there is none."""
    application = ray_serve.get_replica_context().app_name
    states = ray_serve.status().applications[application].deployments[deployment].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


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


# ------------------------------------------------------------------------------------------- routes


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The page, without FastAPI's own answer to a wrong request: ours has the status 400."""
        schema = super().openapi()
        for operation in (each for path in schema["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


def http_app(config: ServeConfig) -> FastAPI:
    """The routes, over the `Ingress` of the replica that they run in; all errors as OpenAI's."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await _here().close()

    app = _App(
        lifespan=lifespan,
        title="Skip-Vision",
        version=version("skipvision"),
        description="Vision-language models that stop paying for redundant visual tokens; OpenAI's protocol.",
        # Its pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    keyed = [Depends(HTTPBearer(auto_error=False, description="an API key, where keys are asked for"))]

    @app.post("/v1/chat/completions", response_model=None, dependencies=keyed, responses=responses.CHAT)
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Write an answer to messages with images."""
        return await _here().chat(body, http)

    @app.post("/v1/overlay", dependencies=keyed, responses=responses.ASKED)
    async def overlay(body: ChatRequest, http: Request) -> dict[str, Any]:
        """Which patches of the messages' images are retained, skipped, merged or dropped; answers nothing."""
        return await _here().overlay(body, http)

    @app.get("/v1/models", dependencies=keyed, responses=responses.KEYED)
    async def models() -> dict[str, Any]:
        """Models and adapters that requests can name."""
        return await _here().models()

    @app.get("/v1/models/{name:path}", dependencies=keyed, responses=responses.NAMED)
    async def model(name: str, http: Request) -> dict[str, Any]:
        """One of them, with the SkipConfig that it runs under."""
        return await _here().model(name, http)

    @app.get("/healthz", response_model=None, responses=responses.HEALTH)
    async def healthz() -> Response:
        """Whether every model has an engine that answers."""
        return await _here().health()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of engines and HTTP replicas, of all nodes."""
        return Response(await exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(page_routes())

    async def failed(http: Request, error: Exception) -> JSONResponse:
        return reported(error).response()

    async def invalid(http: Request, error: Any) -> JSONResponse:
        return reported(_wrong_fields(error.errors(), error.body)).response()

    async def refused(http: Request, error: Any) -> JSONResponse:
        message = f"{http.method} {http.url.path}: {error.detail}"
        problem = Problem(error.status_code, message, headers=error.headers or {})
        return reported(problem).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (Problem, SkipVisionError, RayActorError, Exception):
        app.add_exception_handler(kind, failed)
    limits = config.limits
    app.add_middleware(
        Guard,
        keys=KeyRing(config.keys_file),
        most=limits.open_requests,
        retry_after=limits.retry_after_s,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Around, max_body=int(limits.body_mib * 2**20))
    return app


def _here() -> Ingress:
    return cast(Ingress, ray_serve.get_replica_context().servable_object)


def _wrong_fields(found: Sequence[Any], body: Any) -> Problem:
    """What pydantic says of a body, as OpenAI says it."""
    tree = {"body": body}
    named = [(field_name(each, tree).removeprefix("body").lstrip("."), each) for each in details(found)]
    unknown = [name for name, each in named if each["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(map(repr, unknown))
        return Problem(400, f"Unknown parameter: {names}.", param=unknown[0], code="unknown_parameter")
    # The members of a union may all say the same.
    lines = dict.fromkeys(_complaint(name, each) for name, each in named)
    return Problem(400, "; ".join(lines), param=named[0][0] or None, code="invalid_value")


def _complaint(name: str, problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name or 'the body'}: {message} (got {reprlib.repr(problem.get('input'))})"
