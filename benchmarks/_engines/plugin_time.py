"""The plug-in's own time inside vLLM's prefill: ``python -m benchmarks._engines.plugin_time OPTIONS``.

vLLM runs in this process, and each prefill is one step. Prints the records as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks._engines.vllm_engine import arguments, configure

Times = dict[str, tuple[float, float]]


class _Stopwatch:
    """Sums wall and CPU seconds of calls, by name."""

    def __init__(self) -> None:
        self.total: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def around(self, owner: Any, method: str, name: str) -> None:
        """Measure the calls of a method from now on."""
        setattr(owner, method, self._timed(getattr(owner, method), name))

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = _now()
            result = call(*args, **kwargs)
            for index, (before, after) in enumerate(zip(begin, _now(), strict=True)):
                self.total[name][index] += after - before
            return result

        return timed

    def take(self) -> dict[str, list[float]]:
        """Return the sums, and begin again."""
        total, self.total = dict(self.total), defaultdict(lambda: [0.0, 0.0])
        return total


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Prefill images, and print what each part took."""
    options = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    configure(options)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    channel.write(json.dumps(_measure(options)) + "\n")
    channel.flush()
    os._exit(0)


def _measure(options: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from skipvision.integrations.vllm.families.llava import SkipLlava

    most = max(options["images"])
    tokens = most * (64 + options["skip"]["retained"])
    llm: Any = LLM(**{**arguments(options), "max_num_batched_tokens": max(2048, tokens)})
    watch = _Stopwatch()
    watch.around(llm.llm_engine, "step", "step")
    watch.around(LlavaForConditionalGeneration, "embed_multimodal", "encoder")
    watch.around(SkipLlava, "embed_multimodal", "embed")
    watch.around(SkipLlava, "recompute_mrope_positions", "positions")
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    found = []
    for images in options["images"]:
        record: dict[str, Any] = {"images": images}
        series: dict[str, list[float]] = defaultdict(list)
        files = [Path(options["folder"]) / "images" / f"{number:03}.png" for number in range(images)]
        requests = [
            {"prompt": prompt, "multi_modal_data": {"image": Image.open(file).convert("RGB")}}
            for prompt, file in zip(options["prompts"], files, strict=False)
        ]
        for turn in range(options["repeats"] + 3):
            llm.generate(requests, one, use_tqdm=False)
            times = watch.take()
            if turn < 3:
                continue
            for index, suffix in enumerate(("", "_cpu")):
                own = times["embed"][index] - times["encoder"][index] + times["positions"][index]
                series[f"plugin{suffix}"].append(own)
                series[f"prefill{suffix}"].append(times["step"][index])
            series["encoder"].append(times["encoder"][0])
        found.append(record | series)
    return found


if __name__ == "__main__":
    main()
