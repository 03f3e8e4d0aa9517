"""The list of benchmarks. It imports none of them, so that ``list`` needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

QUIET = "a quiet machine"


@dataclass(frozen=True)
class Benchmark:
    """One script of this folder.

    Attributes:
        name: of its module.
        question: that its numbers answer.
        duration: of a run with default options on two cores.
        needs: besides the environment of ``make install``.
        page: under docs/benchmarks/ with its results.
    """

    name: str
    question: str
    duration: str
    needs: str
    page: str


BENCHMARKS = [
    Benchmark(
        "time_follows_flops",
        "Do prefill and LoRA step become faster in proportion to their FLOPs?",
        "4 min",
        QUIET,
        "time_follows_flops.md",
    ),
    Benchmark(
        "training",
        "How much faster is LoRA fine-tuning than the stock recipes, and how much of that is skipping?",
        "8 min",
        f"{QUIET}; for SFTTrainer an environment with TRL",
        "training.md",
    ),
    Benchmark(
        "planning",
        "How much do select, merge and summary cost?",
        "4 min",
        QUIET,
        "planning.md",
    ),
    Benchmark(
        "engine",
        "How much do continuous batching, pruned caches and packed weights gain? How far is a decode step "
        "from its floor?",
        "8 min",
        f"{QUIET}; for --parts packing a CPU that multiplies bfloat16",
        "engine.md",
    ),
    Benchmark(
        "caption_job",
        "How much does the captioning job add to the engine?",
        "4 min",
        f"{QUIET}; data/shapes of jobs/make_shapes.py",
        "engine.md",
    ),
    Benchmark(
        "engines",
        "How much do pruned images gain in this project's engine and in vLLM, and how does OpenVINO GenAI "
        "compare?",
        "10 min an engine",
        "environments with vLLM and OpenVINO for --engines vllm openvino",
        "engines.md",
    ),
    Benchmark(
        "serve_load",
        "How does the endpoint behave under load, and how much does it add to the engine?",
        "10 min",
        QUIET,
        "serving.md",
    ),
    Benchmark(
        "serve_faults",
        "What happens to requests when a part of the endpoint breaks?",
        "8 min",
        QUIET,
        "serving.md",
    ),
    Benchmark(
        "scale",
        "What is the first bottleneck of a captioning job of 10³ to 10⁹ images, and of an endpoint at up to "
        "10⁵ requests a second?",
        "10 min",
        QUIET,
        "scale.md",
    ),
    Benchmark(
        "gpu",
        "Do time and memory follow at the size of Llama-3-8B on a GPU?",
        "4 min a piece",
        "a CUDA device with 80 GB; only torch, transformers and peft, without `make install`",
        "gpu.md",
    ),
]
"""In the order in which ``list`` and docs/benchmarks/README.md name them."""
