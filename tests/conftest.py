"""Fixtures shared by all tests: a tiny model on disk, a small data set, one local Ray."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backend import HEADS

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""The search path of a process that a test starts: this repository, and what this process was given."""

# Tests run on one CPU each, and the numbers that they compare depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def applications() -> None:
    """Skip a test that needs the jobs or the endpoint where the library is installed alone."""
    pytest.importorskip("ray", reason="needs the extra `apps`")


@pytest.fixture(scope="session")
def tiny_model(applications: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA (16 visual tokens per image) and its processor."""
    return save_tiny_llava(tmp_path_factory.mktemp("model") / "tiny-llava", **HEADS)


@pytest.fixture(scope="session")
def shapes_data(applications: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shapes data set: image files and LLaVA JSON, 40 training and 12 validation rows."""
    from pipelines.shapes.files import ShapesConfig, write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(ShapesConfig(output=folder, train=40, validation=2, test=1))
    return folder


@pytest.fixture(scope="session")
def local_ray(applications: None) -> Iterator[None]:
    """One Ray with four logical CPUs for the whole session; no other process joins it."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        runtime_env={
            "env_vars": {
                "PYTHONPATH": PYTHONPATH,
                "OMP_NUM_THREADS": "1",
                "SKIPVISION_METHODS": "tests.skipvision.further_methods",
            }
        },
        configure_logging=False,
    )
    yield
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for all of its processes
        gc.collect()


def save_tiny_llava(folder: Path, **text_fields: int) -> Path:
    """Write a random LLaVA and its processor; keywords are further fields of its text model's config."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from pipelines.shapes.base.model import build_processor, build_tokenizer

    tokenizer = build_tokenizer(0, vocabulary=320)
    processor = build_processor(tokenizer)
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **text_fields,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Assign each test to a group that one process runs, and start with the groups that take longest.

    Tests that share a Ray form two groups, the endpoint's and the jobs'. Every other file is its own group.
    """

    def group(item: pytest.Item) -> str:
        if "local_ray" not in getattr(item, "fixturenames", ()):
            return str(item.path.relative_to(ROOT))
        return "ray of the endpoint" if (ROOT / "tests/serve") in item.path.parents else "ray of the jobs"

    groups = {item: group(item) for item in items}
    items.sort(key=lambda item: not groups[item].startswith("ray"))
    for item, name in groups.items():
        item.add_marker(pytest.mark.xdist_group(name))
