"""The Ray Serve application: one ingress deployment, and one deployment of engines for each model.

Start it with ``serve run serve.app:build model=models/shapes-llava adapter=runs/demo/adapter``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import click
from ray import cloudpickle
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.schema import LoggingConfig

from pipelines.engines.loading import check_known
from pipelines.engines.model import check_generation
from pipelines.shared.paths import input_path, model_path, output_path
from pipelines.tracking.client import TrackingError, sqlite_file, sqlite_uri
from pipelines.tracking.registry import exact_model, is_registered
from serve.capacity import INGRESS_CPUS
from serve.config import ModelSection, ServeConfig, serve_config
from serve.ingress.dispatch import GRACE_SECONDS
from serve.ingress.ingress import Ingress
from serve.ingress.routes import http_app
from serve.keys import KeyRing
from serve.replica import autoscaling as scaling
from serve.replica.replica import EngineReplica
from serve.replica.vllm import settings as vllm_settings
from skipvision import read_adapter
from skipvision.errors import SkipVisionError

_LOGS = LoggingConfig(encoding="JSON", enable_access_log=False)
"""JSON lines with the request's id. `serve.ingress.middleware` writes the access log."""

_LARGE_MESSAGES = {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1)}}
"""A request carries the pixels of many images from ingress to engine; Ray's default limit is 4 MiB."""

_SPARE = 100
"""Requests that reach an ingress beyond its limit, to be refused by it or to need no engine."""


def build(arguments: dict[str, Any]) -> ray_serve.Application:
    """Build the application from the arguments of ``serve run``.

    Args:
        arguments: settings (`ServeConfig`); fields of sections with dots, ``limits.images=4``.

    Raises:
        SkipVisionError: settings are invalid, or a model, an adapter or the keys cannot be read.
        ClickException: the same in a command of Ray's, which then prints the message without a traceback.
    """
    try:
        return application(serve_config(arguments))
    except SkipVisionError as error:
        if click.get_current_context(silent=True) is None:
            raise
        raise click.ClickException(str(error)) from None


def application(config: ServeConfig) -> ray_serve.Application:
    """Build the application.

    Raises:
        SkipVisionError: a model, an adapter or the keys cannot be read.
    """
    config = _resolved(config)
    engines = [_engines(config, section) for section in config.models]
    ingress = ray_serve.deployment(
        name="ingress",
        num_replicas=config.ingresses,
        # Requests that `serve.ingress.guard` refuses, or that need no engine, also take a slot.
        max_ongoing_requests=config.limits.open_requests + _SPARE,
        max_queued_requests=_SPARE,
        backpressure_config=_backpressure(config),
        # Ray Serve replaces an ingress after three failed checks.
        health_check_period_s=5,
        health_check_timeout_s=10,
        # Longer than any request takes: a stopping ingress finishes its requests first.
        graceful_shutdown_timeout_s=config.limits.request_seconds + GRACE_SECONDS,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": _LARGE_MESSAGES},
        logging_config=_LOGS,
    )(ray_serve.ingress(lambda: http_app(config))(Ingress))
    return ingress.bind(config, *engines)


def _engines(config: ServeConfig, section: ModelSection) -> ray_serve.Application:
    wanted, limits = section.scaling, config.limits
    deployment = ray_serve.deployment(
        name=f"engine-{section.served_name}",
        # The engine has its own queue, from which it fills free rows.
        max_ongoing_requests=section.engine.max_sequences + limits.queued_requests,
        # These wait at each ingress while no engine has room.
        max_queued_requests=limits.queued_requests,
        backpressure_config=_backpressure(config),
        autoscaling_config=_autoscaling(section),
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=limits.request_seconds + GRACE_SECONDS,
        ray_actor_options={
            "num_cpus": wanted.cpus_per_engine,
            "num_gpus": wanted.gpus_per_engine,
            "runtime_env": _LARGE_MESSAGES,
        },
        logging_config=_LOGS,
    )(EngineReplica)
    tracer = config.traces, f"{config.name}-engine"
    return deployment.bind(section, config.tracking_uri, config.adapter_poll_s, tracer)


def _autoscaling(section: ModelSection) -> AutoscalingConfig:
    wanted = section.scaling
    # The controller calls the policy but may not have this package installed: send the code.
    cloudpickle.register_pickle_by_value(scaling)
    with warnings.catch_warnings():
        # Ray 2.60 deprecates the interval but offers no other way to set it for one deployment.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
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


def _backpressure(config: ServeConfig) -> BackpressureConfig:
    """Return Ray's response to a full queue, for requests that `serve.ingress.guard` admitted."""
    return BackpressureConfig(status_code=429, retry_after_s=config.limits.retry_after_s)


def _resolved(config: ServeConfig) -> ServeConfig:
    """Return the settings with absolute paths for the replicas. Raise now what each replica would raise."""
    keys = config.keys_file
    if keys is not None:
        # Not a copy: removing a key from the file must revoke it.
        keys = str(output_path(keys, "keys_file"))
        KeyRing(keys)
    models = [_resolved_model(model) for model in config.models]
    for index, model in enumerate(models):
        if model.engine.backend == "vllm":
            vllm_settings.check_model(model, index)
        else:
            check_generation(model.path)
    sources = {source for model in models for source in model.adapters.values() if is_registered(source)}
    registry = config.tracking_uri
    if registry is not None:
        registry = _absolute_registry(registry)
        _check_registered(registry, sources)
    return config.model_copy(update={"models": models, "keys_file": keys, "tracking_uri": registry})


def _absolute_registry(uri: str) -> str:
    file = sqlite_file(uri)
    return uri if file is None else sqlite_uri(output_path(file, "tracking_uri"))


def _check_registered(registry: str, sources: Iterable[str]) -> None:
    """Raise `ConfigError` if the registry lacks an adapter. Only warn if it is down: engines wait for it."""
    for source in sorted(sources):
        try:
            exact_model(registry, source)
        except TrackingError as error:
            warnings.warn(f"{error}; requests for it are 503 until engines can load it", stacklevel=2)
            return  # a registry that is down takes up to a minute for each call


def _resolved_model(model: ModelSection) -> ModelSection:
    path, adapters = model_path(model.path, "model"), dict(model.adapters)
    check_known(path, "model")
    for name, source in adapters.items():
        if not is_registered(source):
            adapters[name] = input_path(source, f"adapter {name}")
            read_adapter(adapters[name])
    return model.model_copy(update={"path": path, "adapters": adapters})
