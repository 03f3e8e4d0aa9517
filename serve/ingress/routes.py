"""The endpoint's routes, and one format for all of its errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
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
from serve.ingress.head import Head
from serve.ingress.ingress import Ingress
from serve.ingress.invalid_body import invalid_body
from serve.ingress.middleware import AccessLog
from serve.keys import KeyRing
from serve.observe.metrics_page import metrics_page
from serve.page.routes import page_routes
from serve.problem import Problem
from serve.reporting import reported
from skipvision.errors import SkipVisionError

_CODES = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed"}
"""Codes of the errors that FastAPI itself raises, by status."""


def http_app(config: ServeConfig) -> FastAPI:
    """Return the application whose routes call the `Ingress` of the replica that they run in."""
    app = _App(
        lifespan=_lifespan,
        title="Skip-Vision",
        version=version("skipvision"),
        description="Vision-language models that stop paying for redundant visual tokens; OpenAI's protocol.",
        # FastAPI's documentation pages load scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    _add_routes(app)
    app.include_router(page_routes())
    _add_error_handlers(app)
    _add_middleware(app, config)
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI page without FastAPI's 422: here an invalid request has the status 400."""
        schema = super().openapi()
        for operation in (each for path in schema["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        return schema


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await _this_ingress().close()


def _this_ingress() -> Ingress:
    return cast(Ingress, ray_serve.get_replica_context().servable_object)


def _add_routes(app: FastAPI) -> None:
    keyed = [Depends(HTTPBearer(auto_error=False, description="an API key, if the deployment has keys"))]

    @app.post("/v1/chat/completions", response_model=None, dependencies=keyed, responses=responses.CHAT)
    async def chat(body: ChatRequest, http: Request) -> Response:
        """Generate the next message of a conversation with text and images."""
        return await _this_ingress().chat(body, http)

    @app.post("/v1/overlay", dependencies=keyed, responses=responses.WITH_BODY)
    async def overlay(body: ChatRequest, http: Request) -> dict[str, Any]:
        """Show which patches of the messages' images are retained, skipped, merged or dropped; no answer."""
        return await _this_ingress().overlay(body, http)

    @app.get("/v1/models/", include_in_schema=False, dependencies=keyed)
    @app.get("/v1/models", dependencies=keyed, responses=responses.KEYED)
    async def models() -> dict[str, Any]:
        """List the models and adapters that requests can name."""
        return await _this_ingress().models()

    @app.get("/v1/models/{name:path}", dependencies=keyed, responses=responses.NAMED)
    async def model(name: str) -> dict[str, Any]:
        """Show one model, with the SkipConfig that it runs under."""
        return await _this_ingress().model(name)

    @app.get("/healthz", response_model=None, responses=responses.HEALTH)
    async def healthz() -> Response:
        """Report whether every model has an engine that responds."""
        return await _this_ingress().health()

    @app.get("/metrics", response_class=Response, dependencies=keyed, responses=responses.METRICS)
    async def metrics() -> Response:
        """Show the Prometheus metrics of the engines and HTTP replicas of all nodes."""
        return Response(await metrics_page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_error_handlers(app: FastAPI) -> None:
    async def own(http: Request, error: Exception) -> Response:
        return reported(error).response()

    async def validation(http: Request, error: Any) -> Response:
        return reported(invalid_body(error.errors(), error.body)).response()

    async def http_error(http: Request, error: Any) -> Response:
        message, code = f"{http.method} {http.url.path}: {error.detail}", _CODES.get(error.status_code)
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] += ", HEAD"
        problem = Problem(error.status_code, message, code=code, headers=headers)
        return reported(problem).response()

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http_error)
    for kind in (Problem, SkipVisionError, RayActorError):
        app.add_exception_handler(kind, own)


def _add_middleware(app: FastAPI, config: ServeConfig) -> None:
    """Add middleware from the innermost to the outermost."""
    limits, keys = config.limits, KeyRing(config.keys_file)
    app.add_middleware(Head)
    app.add_middleware(Guard, keys=keys, max_open=limits.open_requests, retry_after=limits.retry_after_s)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog, max_body=int(limits.body_mib * 2**20))
