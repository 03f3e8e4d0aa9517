"""Fixtures of tests that run vLLM: `make test-vllm`. Elsewhere these files are not collected."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import entry_points

import pytest
import torch
from peft import LoraConfig, get_peft_model

import skipvision as sv
from pipelines.shapes.scenes import render, sample_scene
from skipvision.loading import load_model, load_processor
from tests.conftest import ROOT
from tests.skipvision.cases import train_summary

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.update(ENVIRONMENT)

BASE = ROOT / "models" / "shapes-llava"
TUNED = sv.SkipConfig(retained=64, skipped=0, summary_tokens=1)
QUESTION = "Describe the image."
TOKENS = 16


@pytest.fixture(scope="session", autouse=True)
def _installed():
    names = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert "skipvision" in names, "install the project in this environment: make install-vllm"


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """shapes-llava with an adapter of random weights, and a summary layer that scores tokens differently."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tuned")
    model = get_peft_model(load_model(BASE), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.01)
    train_summary(sv.attach(model, TUNED).summary)
    sv.save_adapter(model, folder / "adapter")
    return sv.export(BASE, folder / "adapter", folder / "exported")


@pytest.fixture(scope="session")
def scenes():
    return [render(sample_scene(7, "test", number)[0]) for number in range(6)]


@pytest.fixture(scope="session")
def engine_answers(exported):
    """Token ids by our engine, for prompts of (question, images, SkipConfig)."""
    model = sv.from_exported(exported, dtype="float32")
    sampling = sv.Sampling(max_new_tokens=TOKENS)

    def answer(prompts):
        with sv.Engine(model, load_processor(exported), kv_budget_bytes=2**28) as engine:
            requests = [
                sv.Request(prompt(question, len(images)), images, skip=config, sampling=sampling, key=number)
                for number, (question, images, config) in enumerate(prompts)
            ]
            done = {completion.key: completion for completion in engine.run(requests)}
        return [list(done[number].choices[0].token_ids) for number in range(len(prompts))]

    return answer


def prompt(question, images=1):
    return f"USER: {'<image>' * images}\n{question} ASSISTANT:"
