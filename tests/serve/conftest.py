"""Two deployments of the tiny model on the session's Ray, shared by all tests of the endpoint.

`endpoint` is open to everyone and has two adapters. `guarded` has keys, traces, an adapter from MLflow, and
low limits. With ``TEST_BACKEND=vllm`` in the environment both run on vLLM, which has no skipped tokens.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.backend import ENGINE, ON_VLLM

# By default Ray and OpenTelemetry export only every few seconds.
os.environ.setdefault("RAY_metrics_report_interval_ms", "500")
os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", "200")

SKIP = {"retained": 4, "skipped": 0, "summary_tokens": 0} if ON_VLLM else {"retained": 4, "skipped": 6}
KEPT = 4 if ON_VLLM else 4 + 2
"""Visual tokens of an image in the cache under `SKIP`."""

GUARDED_ENGINE = (
    {**ENGINE, "engine_kwargs": {**ENGINE["engine_kwargs"], "map_skipped": True}} if ON_VLLM else {}
)
ORIGIN = "https://page.example"
LONG = {
    "type": "json_schema",
    "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 350}},
}
"""A response_format that makes an answer 350 characters long."""


class Endpoint(NamedTuple):
    """An endpoint's URL, base model and adapters."""

    url: str
    model: Path
    adapters: dict[str, Path]


class Guarded(NamedTuple):
    """The second deployment: its URL, its clients' keys, its registry and its traces."""

    url: str
    alice: str
    bob: str
    registry: str
    storage: Path
    spans: list[Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(check: Callable[[], object], seconds: float = 20) -> None:
    """Wait until a check returns a true value."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def noise(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "png") -> str:
    buffer = io.BytesIO()
    noise(seed, size).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def question(text: str = "what is it?", *seeds: int) -> list[dict[str, object]]:
    """One user message with an image for each seed (or one)."""
    images = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds or (0,)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def served_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the deployments: the tiny one. For vLLM with other names of weights."""
    if not ON_VLLM:
        return tiny_model
    import skipvision as sv

    folder = tmp_path_factory.mktemp("served") / "exported"
    return sv.export(tiny_model, None, folder, config=sv.SkipConfig.full())


@pytest.fixture(scope="session")
def adapters(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Skip-Vision adapter and one of full tokens, random, for the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from skipvision import SkipConfig, attach, save_adapter

    where = tmp_path_factory.mktemp("serve-adapters")
    for number, (name, skip) in enumerate((("red", SkipConfig(**SKIP)), ("blue", None))):
        torch.manual_seed(number)
        base = AutoModelForImageTextToText.from_pretrained(served_model)
        config = LoraConfig(r=4, target_modules=r".*language_model.*_proj", init_lora_weights=False)
        model = get_peft_model(base, config)
        if skip is not None:
            attach(model, skip)
        save_adapter(model, where / name)
    return {name: where / name for name in ("red", "blue")}


@pytest.fixture(scope="session")
def endpoint(local_ray: None, served_model: Path, adapters: dict[str, Path]) -> Iterator[Endpoint]:
    from ray import serve as ray_serve

    from serve.app import build
    from serve.deploy import start

    port = free_port()
    start("127.0.0.1", port)
    settings = {
        "models": [
            {
                "path": str(served_model),
                "name": "tiny",
                "skip": SKIP,
                "dtype": "float32",
                "adapters": {name: str(folder) for name, folder in adapters.items()}
                | {"org/blue": str(adapters["blue"])},
                "engine": {"max_sequences": 4, "kv_budget_bytes": 2**23, **ENGINE},
                "scaling": {"cpus_per_engine": 0.5},
            }
        ],
        "limits": {"max_new_tokens": 400, "images": 3, "request_seconds": 30},
    }
    ray_serve.run(build(settings), name="skipvision", route_prefix="/")
    yield Endpoint(f"http://127.0.0.1:{port}", served_model, adapters)
    ray_serve.shutdown()


def register(adapter: Path, registry: str, storage: Path) -> None:
    """Register a folder as the newest version of the model "shapes", with the alias "champion"."""
    from pipelines.tracking.run import Tracker

    tracker = Tracker.start(registry, experiment="tests", run_name="run", artifacts=storage / "artifacts")
    tracker.register(adapter, "shapes", "champion")
    tracker.close()


@pytest.fixture(scope="session")
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector's URL, and the spans that it receives, each with the name of its service."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans.extend((named["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


@pytest.fixture(scope="session")
def guarded(
    endpoint: Endpoint, collector: tuple[str, list[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guarded]:
    from ray import serve as ray_serve

    from pipelines.tracking.config import TrackingConfig
    from serve.app import build
    from serve.keys import add_key

    folder = tmp_path_factory.mktemp("guarded")
    registry = TrackingConfig().absolute_uri(folder)
    register(endpoint.adapters["red"], registry, folder)
    keys = folder / "keys.yaml"
    alice, bob = add_key(keys, "alice", 1), add_key(keys, "bob")
    settings = {
        "name": "guarded",
        "models": [
            {
                "path": str(endpoint.model),
                "name": "small",
                "dtype": "float32",
                "adapters": {"shapes": "models:/shapes@champion"},
                "engine": {"max_sequences": 1, "kv_budget_bytes": 2**22, **GUARDED_ENGINE},
                "scaling": {"cpus_per_engine": 0.25},
            }
        ],
        "keys_file": keys.name,
        "tracking_uri": registry,
        "adapter_poll_s": 0.5,
        "traces": collector[0],
        "cors_origins": [ORIGIN],
        "limits": {"queued_requests": 2, "max_new_tokens": 400, "retry_after_s": 2},
    }
    with contextlib.chdir(folder):  # replicas run in another folder
        application = build(settings)
    ray_serve.run(application, name="guarded", route_prefix="/guarded")
    yield Guarded(f"{endpoint.url}/guarded/v1", alice, bob, registry, folder, collector[1])
    ray_serve.delete("guarded")
