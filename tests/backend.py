"""The engine that tests of jobs and of the endpoint run: the library's own or vLLM.

`make test-vllm` sets ``TEST_BACKEND=vllm``. On vLLM no token skips the FFN, and models have names of weights
and sizes of heads that it can load.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

BACKEND = os.environ.get("TEST_BACKEND", "native")
ON_VLLM = BACKEND == "vllm"
on_native = pytest.mark.skipif(ON_VLLM, reason="only the native engine does this")
on_vllm = pytest.mark.skipif(not ON_VLLM, reason="needs TEST_BACKEND=vllm: make test-vllm")

ENGINE: dict[str, Any] = (
    {"backend": "vllm", "engine_kwargs": {"max_model_len": 512, "enforce_eager": True}} if ON_VLLM else {}
)
"""Settings of every engine of the tiny model."""
HEADS = {"head_dim": 32} if ON_VLLM else {}
"""Fields of the tiny model's text config: vLLM's attention on CPUs needs larger heads than it has."""
