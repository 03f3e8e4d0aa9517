"""The application that Ray Serve runs::

serve run serve.app:build model=models/shapes-llava adapter=runs/demo/adapter
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ray import cloudpickle
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from pipelines.engines.loading import check_known
from pipelines.shared.paths import input_path, model_path, output_path
from pipelines.tracking.client import TrackingError, sqlite_file
from pipelines.tracking.registry import exact_model, is_registered
from serve.config import ModelSection, ServeConfig, serve_config
from serve.ingress.dispatch import GRACE_SECONDS
from serve.ingress.ingress import Ingress
from serve.ingress.routes import http_app
from serve.keys import KeyRing
from serve.replica import autoscaling as scaling
from serve.replica.replica import EngineReplica
from skipvision import read_adapter
from skipvision.errors import ConfigError

_LOGS = LoggingConfig(encoding="JSON", enable_access_log=False)
"""One JSON object a line, with the request's id; `serve.ingress.middleware` writes the access log."""


_MESSAGES = {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}}
"""Between ingress and engine go the pixels of many images; Ray's limit is 4 MiB."""

_SPARE = 100
"""Requests at an ingress beyond those that it takes on."""


def build(arguments: dict[str, Any]) -> ray_serve.Application:
    """The ingress and an engine deployment for each model.

    Args:
        arguments: settings (`ServeConfig`); sections with dots, ``limits.images=4``.

    Raises:
        ConfigError: settings that are wrong, all of them named.
    """
    try:
        config = serve_config(arguments)
    except ValidationError as error:
        lines = [_complaint(problem) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    return application(config)


def application(config: ServeConfig) -> ray_serve.Application:
    """The same, of settings that are read already.

    Raises:
        SkipVisionError: a model, an adapter or the keys are not there, or cannot be read.
    """
    config = _found(config)
    engines = [_engines(config, section) for section in config.models]
    ingress = ray_serve.deployment(
        name="ingress",
        num_replicas=config.ingresses,
        # Those that `serve.ingress.guard` refuses, and those that need no engine, need a place, too.
        max_ongoing_requests=config.limits.open_requests + _SPARE,
        max_queued_requests=_SPARE,
        backpressure_config=_full(config),
        # Three times without an answer, and another one takes its place.
        health_check_period_s=5,
        health_check_timeout_s=10,
        # Longer than any request takes: who is told to go answers first what it has.
        graceful_shutdown_timeout_s=config.limits.request_seconds + GRACE_SECONDS,
        ray_actor_options={"num_cpus": 0.25, "runtime_env": _MESSAGES},
        logging_config=_LOGS,
    )(ray_serve.ingress(lambda: http_app(config))(Ingress))
    return ingress.bind(config, *engines)


def _engines(config: ServeConfig, section: ModelSection) -> ray_serve.Application:
    wanted, limits = section.scaling, config.limits
    # The controller, which calls it, does not have this project on its path.
    cloudpickle.register_pickle_by_value(scaling)
    with warnings.catch_warnings():
        # Ray 2.60 warns of the interval, but has no other way yet to set it for one deployment.
        warnings.simplefilter("ignore", DeprecationWarning)
        autoscaling = AutoscalingConfig(
            min_replicas=wanted.min_engines,
            max_replicas=wanted.max_engines,
            initial_replicas=max(wanted.min_engines, 1),
            upscale_delay_s=wanted.upscale_delay_s,
            downscale_delay_s=wanted.downscale_delay_s,
            metrics_interval_s=wanted.interval_s,
            look_back_period_s=3 * wanted.interval_s,
            policy=AutoscalingPolicy(
                policy_function=scaling.ByLoad,
                policy_kwargs={"target": wanted.target_load, "rows": section.engine.max_sequences},
            ),
        )
    deployment = ray_serve.deployment(
        name=f"engine-{section.served_name}",
        # The engine queues by itself, and needs to see what waits to fill its rows.
        max_ongoing_requests=section.engine.max_sequences + limits.queued_requests,
        # At each ingress, while no engine has room.
        max_queued_requests=limits.queued_requests,
        backpressure_config=_full(config),
        autoscaling_config=autoscaling,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=limits.request_seconds + GRACE_SECONDS,
        ray_actor_options={
            "num_cpus": wanted.cpus_per_engine,
            "num_gpus": wanted.gpus_per_engine,
            "runtime_env": _MESSAGES,
        },
        logging_config=_LOGS,
    )(EngineReplica)
    tracer = config.traces, f"{config.name}-engine"
    return deployment.bind(section, config.tracking_uri, config.adapter_poll_s, tracer)


def _full(config: ServeConfig) -> BackpressureConfig:
    """Ray's response when a queue is full, where `serve.ingress.guard` did not answer before."""
    return BackpressureConfig(status_code=429, retry_after_s=config.limits.retry_after_s)


def _found(config: ServeConfig) -> ServeConfig:
    """With whole paths, as replicas run elsewhere; what is wrong is said now, and not by each of them."""
    keys = config.keys_file
    if keys is not None:
        # The file itself: a copy of it would go on admitting those who are taken out of it.
        keys = str(output_path(keys, "keys_file"))
        KeyRing(keys)
    models = [_found_model(model) for model in config.models]
    sources = {source for model in models for source in model.adapters.values() if is_registered(source)}
    registry = config.tracking_uri
    if registry is not None:
        registry = _absolute_registry(registry)
        _look_up(registry, sources)
    return config.model_copy(update={"models": models, "keys_file": keys, "tracking_uri": registry})


def _absolute_registry(uri: str) -> str:
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{output_path(file, 'tracking_uri')}"


def _look_up(registry: str, sources: Iterable[str]) -> None:
    """Raise `ConfigError` for what the registry does not have; engines wait for one that is away."""
    for source in sorted(sources):
        try:
            exact_model(registry, source)
        except TrackingError as error:
            warnings.warn(f"{error}; requests for it are 503 until engines can load it", stacklevel=2)
            return  # what did not answer once may take a minute not to answer again


def _found_model(model: ModelSection) -> ModelSection:
    path, adapters = model_path(model.path, "model"), dict(model.adapters)
    check_known(path, "model")
    for name, source in adapters.items():
        if not is_registered(source):
            adapters[name] = input_path(source, f"adapter {name}")
            read_adapter(adapters[name])
    return model.model_copy(update={"path": path, "adapters": adapters})


def _complaint(problem: ErrorDetails) -> str:
    """One wrong setting; the whole tree is no value to name."""
    name = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r}: {message}" if name else message
