"""vLLM answers a job's requests as the native engine does. Runs in the environment of vLLM."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import skipvision as sv
from pipelines.caption.config import CaptionConfig
from pipelines.caption.job import run_caption
from pipelines.engines.backend import open_engine
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from pipelines.engines.vllm.settings import check_arguments, check_settings, vllm_model
from pipelines.evaluation.items import Item, read_items
from pipelines.score.config import ScoreConfig
from pipelines.score.job import run_score
from pipelines.shapes.files import ShapesConfig, write_shapes
from skipvision.engine import Completion, Request, Sampling
from skipvision.errors import ConfigError, InputError

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
MODEL = Path(__file__).parents[4] / "models/shapes-llava"
SMALL = {"max_model_len": 1024, "enforce_eager": True}
SKIP = sv.SkipConfig(retained=64, skipped=0, summary_tokens=1)
FULL = sv.SkipConfig.full()
COUNTS = ("prompt_tokens", "completion_tokens", "visual_total", "visual_retained", "visual_cached")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(ShapesConfig(output=folder, train=0, validation=0, test=6, tsv=True))
    return folder / "images" / "test"


@pytest.fixture(scope="module")
def requests(shapes: Path) -> list[Request]:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
    text = load_processor(str(MODEL)).apply_chat_template(chat, add_generation_prompt=True)
    images = [Image.open(file).convert("RGB") for file in sorted(shapes.glob("*.png"))]
    greedy = Sampling(max_new_tokens=48)
    return [
        *(Request(text, [image], sampling=greedy) for image in images),
        Request(text, images[:1], sampling=Sampling(max_new_tokens=48, stop=(" at",))),
        Request(text, images[:1], sampling=Sampling(max_new_tokens=5)),
        Request(text.replace("<image>", "<image> <image>"), images[:2], sampling=greedy),
        Request("x " * 5000, sampling=greedy),
    ]


def answers(
    backend: str, requests: list[Request], folder: Path, skip: sv.SkipConfig
) -> tuple[list[Any], sv.engine.Statistics]:
    """The outcomes of one engine, and its statistics."""
    model = EngineModel(str(MODEL), "shapes", None, None, skip, "float32", "sdpa")
    settings = BackendSection(max_sequences=4)
    if backend == "vllm":
        settings = BackendSection(backend="vllm", max_sequences=4, engine_kwargs=SMALL)
        check_settings(model, settings)
        model = vllm_model(model, folder)
        check_arguments(model, settings)
    engine = open_engine(model, settings, torch.device("cpu"), print)
    engine.wait_until_ready()
    try:
        return engine.answer(requests), engine.statistics()
    finally:
        engine.stop()


@pytest.mark.parametrize("skip", [FULL, SKIP], ids=["full", "pruned"])
def test_its_answers_are_those_of_the_native_engine(skip, requests, tmp_path):
    drawn = [Request(requests[0].prompt, requests[0].images, sampling=Sampling(temperature=1.0, seed=5))] * 2
    wrong = [replace(requests[0], images=requests[-2].images[:number]) for number in (0, 2)]
    vllm, statistics = answers("vllm", [*requests, *wrong, *drawn], tmp_path / "model", skip)
    native, _ = answers("native", requests, tmp_path / "model", skip)
    for ours, theirs in zip(native, vllm, strict=False):
        if not isinstance(ours, Completion):
            assert isinstance(ours, InputError)
            assert isinstance(theirs, InputError)
            continue
        assert isinstance(theirs, Completion), theirs
        one, other = ours.choices[0], theirs.choices[0]
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.token_ids == other.token_ids
        for name in COUNTS:
            assert getattr(ours.usage, name) == getattr(theirs.usage, name), name
        assert 0 <= theirs.timing.queued <= theirs.timing.first_token <= theirs.timing.total
    assert all(isinstance(one, InputError) for one in vllm[-4:-2]), "one placeholder, no image or two"
    assert vllm[-1].choices[0].token_ids == vllm[-2].choices[0].token_ids, "a seed draws the same tokens"
    assert sum(statistics.requests.values()) == sum(isinstance(one, Completion) for one in vllm)
    assert 0 < statistics.decode_tokens / statistics.decode_steps <= 4


def test_what_vllm_refuses_is_reported_before_ray_starts(tmp_path):
    model = vllm_model(
        EngineModel(str(MODEL), "shapes", None, None, FULL, "float32", "sdpa"), tmp_path / "model"
    )
    for arguments, says in (
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"max_model_len": 10**7}, "max_model_len"),
        ({"mm_processor_kwargs": {"skip": {"retained": 4, "skipped": 4}}}, "skipped"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_arguments(model, BackendSection(backend="vllm", engine_kwargs=arguments))


@pytest.mark.usefixtures("local_ray")
def test_scores_are_those_of_the_native_engine(shapes, tmp_path):
    def items(backend: str, **engine: Any) -> list[Item]:
        settings = {
            "name": backend,
            "storage": str(tmp_path),
            "systems": {
                "pruned": {"model": {"path": str(MODEL), "dtype": "float32"}, "skip": SKIP.model_dump()}
            },
            "reference": "pruned",
            "datasets": [{"name": "Shapes", "path": str(shapes.parents[1] / "test.tsv"), "limit": 12}],
            "engine": {"backend": backend, "max_sequences": 4, **engine},
            "sampling": {"max_new_tokens": 32},
            "scaling": {"cpus_per_worker": 1},
        }
        return read_items(Path(run_score(ScoreConfig.model_validate(settings))["items"]["pruned"]))

    native = items("native")
    assert len(native) == 12
    assert all(item.prediction and item.error is None for item in native)
    theirs = items("vllm", engine_kwargs=SMALL)
    assert theirs == native
    probabilities = [item.log_probability for item in native]
    assert [item.log_probability for item in theirs] == pytest.approx(probabilities, abs=0.01)


@pytest.mark.usefixtures("local_ray")
def test_a_folder_is_captioned(shapes, tmp_path):
    images = len(list(shapes.iterdir()))
    folder = shutil.copytree(shapes, tmp_path / "images")  # other tests read `shapes`
    (folder / "broken.png").write_text("no image")
    config = CaptionConfig.model_validate(
        {
            "name": "captions",
            "storage": str(tmp_path),
            "model": {"path": str(MODEL), "dtype": "float32"},
            "input": {"source": str(folder)},
            "engine": {"backend": "vllm", "max_sequences": 4, "engine_kwargs": SMALL},
            "sampling": {"max_new_tokens": 48},
            "output": {"shard_rows": 3},
            "samples": 0,
            "scaling": {"cpus_per_worker": 1},
        }
    )
    result = run_caption(config)
    assert (result["captioned"], result["errors"]) == (images, {"unreadable image": 1})
    assert result["tokens"]["visual_tokens"] == images * 256
    assert not (tmp_path / "captions" / "exported").exists()
    assert run_caption(config)["already_finished"]
