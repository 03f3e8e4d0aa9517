"""One deployment of the tiny model with two adapters, on the session's Ray, for all tests of the endpoint."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

SKIP = {"retained": 4, "skipped": 6}


class Endpoint(NamedTuple):
    """Where it is, and what it is made of."""

    url: str
    model: Path
    adapters: dict[str, Path]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def picture(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(seed: int = 0, size: tuple[int, int] = (64, 48), kind: str = "png") -> str:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def asking(text: str = "what is it?", *seeds: int) -> list[dict[str, object]]:
    """One user message with an image for each seed (or one)."""
    images = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds or (0,)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Skip-Vision adapter and one of full tokens, random, for the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from skipvision import SkipConfig, attach, save_adapter

    where = tmp_path_factory.mktemp("serve-adapters")
    for number, (name, skip) in enumerate((("red", SkipConfig(**SKIP)), ("blue", None))):
        torch.manual_seed(number)
        base = AutoModelForImageTextToText.from_pretrained(tiny_model)
        config = LoraConfig(r=4, target_modules=r".*language_model.*_proj", init_lora_weights=False)
        model = get_peft_model(base, config)
        if skip is not None:
            attach(model, skip)
        save_adapter(model, where / name)
    return {name: where / name for name in ("red", "blue")}


@pytest.fixture(scope="session")
def endpoint(local_ray: None, tiny_model: Path, adapters: dict[str, Path]) -> Iterator[Endpoint]:
    from ray import serve as ray_serve

    from serve.app import build

    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {
        "models": [
            {
                "path": str(tiny_model),
                "name": "tiny",
                "dtype": "float32",
                "adapters": {name: str(folder) for name, folder in adapters.items()},
                "engine": {"max_sequences": 4, "kv_budget_bytes": 2**23},
                "scaling": {"cpus_per_engine": 0.5},
            }
        ],
        "limits": {"max_new_tokens": 400, "images": 3, "request_seconds": 30},
    }
    ray_serve.run(build(settings), name="skipvision", route_prefix="/")
    yield Endpoint(f"http://127.0.0.1:{port}", tiny_model, adapters)
    ray_serve.shutdown()
