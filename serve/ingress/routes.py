"""The endpoint's routes, and how all errors leave it."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import AsyncIterator, Iterable, Sequence
from importlib.metadata import version
from typing import Any, cast

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serve.chat import openapi as responses
from serve.chat.schemas import ChatRequest
from serve.config import ServeConfig
from serve.ingress.guard import Guard
from serve.ingress.ingress import Ingress
from serve.ingress.middleware import AccessLog
from serve.keys import KeyRing
from serve.observe.metrics_page import exposition
from serve.page import page_routes
from serve.problem import Problem
from serve.reporting import reported
from skipvision.errors import SkipVisionError
from skipvision.problems import field_name, leaf_errors

_TOLD = 10
"""Mistakes that an answer names."""

_LONGEST_NAME = 100

_CODES = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}
"""Of what FastAPI refuses by itself."""


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
        await _this_ingress().close()

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
        return await _this_ingress().chat(body, http)

    @app.post("/v1/overlay", dependencies=keyed, responses=responses.ASKED)
    async def overlay(body: ChatRequest, http: Request) -> dict[str, Any]:
        """Which patches of the messages' images are retained, skipped, merged or dropped; answers nothing."""
        return await _this_ingress().overlay(body, http)

    @app.get("/v1/models", dependencies=keyed, responses=responses.KEYED)
    async def models() -> dict[str, Any]:
        """Models and adapters that requests can name."""
        return await _this_ingress().models()

    @app.get("/v1/models/{name:path}", dependencies=keyed, responses=responses.NAMED)
    async def model(name: str) -> dict[str, Any]:
        """One of them, with the SkipConfig that it runs under."""
        return await _this_ingress().model(name)

    @app.get("/healthz", response_model=None, responses=responses.HEALTH)
    async def healthz() -> Response:
        """Whether every model has an engine that answers."""
        return await _this_ingress().health()

    @app.get("/metrics", response_class=Response, dependencies=keyed, responses=responses.METRICS)
    async def metrics() -> Response:
        """Prometheus metrics of engines and HTTP replicas, of all nodes."""
        return Response(await exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(page_routes())

    async def failed(http: Request, error: Exception) -> Response:
        return reported(error).response()

    async def invalid(http: Request, error: Any) -> Response:
        return reported(_wrong_fields(error.errors(), error.body)).response()

    async def refused(http: Request, error: Any) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        problem = Problem(
            error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers or {}
        )
        return reported(problem).response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (Problem, SkipVisionError, RayActorError):
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
    app.add_middleware(AccessLog, max_body=int(limits.body_mib * 2**20))
    return app


def _this_ingress() -> Ingress:
    return cast(Ingress, ray_serve.get_replica_context().servable_object)


def _wrong_fields(found: Sequence[Any], body: Any) -> Problem:
    """What pydantic says of a body, as OpenAI says it."""
    if body is None or isinstance(body, (bytes, str)) or found[0]["type"] == "json_invalid":
        return Problem(400, _no_json(found[0], body), code="invalid_value")
    tree = {"body": body}
    named = [(field_name(each, tree).removeprefix("body").lstrip("."), each) for each in leaf_errors(found)]
    unknown = [name for name, each in named if each["type"] == "extra_forbidden"]
    if unknown:
        names = _first(map(reprlib.repr, unknown), ", ")
        param = unknown[0][:_LONGEST_NAME]
        return Problem(400, f"Unknown parameter: {names}.", param=param, code="unknown_parameter")
    # The members of a union may all say the same.
    lines = _first(dict.fromkeys(_complaint(name, each) for name, each in named), "; ")
    return Problem(400, lines, param=named[0][0] or None, code="invalid_value")


def _no_json(problem: Any, body: Any) -> str:
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    if body:
        return "the body is not read as JSON: send Content-Type: application/json, and an object"
    return "there is no body: send JSON"


def _first(lines: Iterable[str], between: str) -> str:
    told = [*lines]
    more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    return between.join(told[:_TOLD]) + more


def _complaint(name: str, problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name or 'the body'}: {message} (got {reprlib.repr(problem.get('input'))})"
