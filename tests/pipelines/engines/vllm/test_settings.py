"""What vLLM gets from a job's settings, and what is refused before it starts. vLLM itself is not needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionFolder
from pipelines.caption.rows import CaptionRow
from pipelines.caption.stages import prepare_row
from pipelines.data.rows import Message
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from pipelines.engines.templates import TemplateProcess
from pipelines.engines.vllm.settings import check_settings, engine_arguments, vllm_model
from pipelines.score.folder import ScoreFolder
from skipvision.errors import ConfigError
from skipvision.exporting.read import settings_of

SKIP = sv.SkipConfig(retained=4, skipped=0)
FULL = sv.SkipConfig.full()


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny_model), lora)
    sv.attach(model, SKIP)
    return sv.save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


def model_at(path: Path, adapter: Path | None = None, **changes: Any) -> EngineModel:
    skip = FULL if adapter is None else SKIP
    model = EngineModel(str(path), "label", adapter, adapter and "adapter@1", skip, "float32", "sdpa")
    return replace(model, **changes)


def test_all_that_vllm_cannot_do_is_listed_by_name(tiny_model):
    settings = BackendSection(
        backend="vllm",
        prefill_tokens=77,
        compile_decoding=True,
        engine_kwargs={"dtype": "half", "trust_remote_code": True, "tensor_parallel_size": 2},
    )
    model = model_at(tiny_model, attention="eager", skip=replace_skipped())
    with pytest.raises(ConfigError) as refused:
        check_settings(model, settings)
    message = str(refused.value)
    for text in (
        "engine.prefill_tokens = 77",
        "engine.compile_decoding = True",
        "engine.engine_kwargs.dtype: this is decided by another setting: model.dtype",
        "engine.engine_kwargs.trust_remote_code",
        "model.attention = eager",
        "skip",
    ):
        assert text in message
    assert "tensor_parallel_size" not in message
    assert ("vLLM is not installed here" in message) is (find_spec("vllm") is None)


def test_layers_that_lack_tokens_are_refused(tiny_model):
    skip = sv.SkipConfig(retained=4, skipped=0, drop_after=0)
    with pytest.raises(
        ConfigError, match=r"skip(\.drop_after = 0: in vLLM all layers|: vLLM prunes images by)"
    ):
        check_settings(model_at(tiny_model, skip=skip), BackendSection(backend="vllm"))


def replace_skipped() -> sv.SkipConfig:
    return sv.SkipConfig(retained=4, skipped=4)


def test_arguments_of_vllm_need_its_backend():
    with pytest.raises(ValueError, match="set backend to vllm"):
        BackendSection(engine_kwargs={"tensor_parallel_size": 2})


def test_a_model_is_exported_where_vllm_could_not_load_it(tiny_model, adapter, tmp_path):
    """With an adapter, and with the names of weights that transformers saves now."""
    merged = vllm_model(model_at(tiny_model, adapter), tmp_path / "merged")
    assert (merged.base, merged.adapter) == (str(tmp_path / "merged"), None)
    assert settings_of(tmp_path / "merged").skip == SKIP
    assert merged.adapter_label == "adapter@1"
    renamed = vllm_model(model_at(tiny_model), tmp_path / "renamed")
    assert renamed.base == str(tmp_path / "renamed")
    again = vllm_model(renamed, tmp_path / "third")
    assert again == renamed
    assert not (tmp_path / "third").exists()


def test_the_arguments_of_vllm(tiny_model, adapter, tmp_path):
    settings = BackendSection(
        backend="vllm",
        max_sequences=3,
        engine_kwargs={"max_model_len": 99, "mm_processor_kwargs": {"do_rescale": True}},
    )
    model = vllm_model(model_at(tiny_model, adapter), tmp_path / "merged")
    arguments = engine_arguments(model, settings, "float32")
    assert arguments == {
        "model": model.base,
        "dtype": "float32",
        "max_num_seqs": 3,
        "kv_cache_memory_bytes": 2**30,
        "max_model_len": 99,
        "mm_processor_kwargs": {"do_rescale": True},
    }
    full = engine_arguments(replace(model, skip=FULL), settings, "float32")
    assert full["mm_processor_kwargs"] == {"do_rescale": True, "skip": "full"}
    spelled = sv.SkipConfig(retained=1.0, skipped=0, summary_tokens=0, select="norm")
    assert engine_arguments(replace(model, skip=spelled), settings, "float32") == full
    other = SKIP.model_copy(update={"retained": 2})
    pruned = engine_arguments(replace(model, skip=other), settings, "float32")
    assert pruned["mm_processor_kwargs"]["skip"] == other.model_dump()


def test_vllm_gets_the_rendered_prompt_and_the_images(tiny_model, shapes_data):
    from pipelines.data.images import FileImage

    processor = load_processor(str(tiny_model))
    file = next((shapes_data / "images").rglob("*.png"))
    row = CaptionRow("a", "b", (Message("user", "<image>What is here?"),), (FileImage(str(file)),))
    template = TemplateProcess(processor)
    prepared = prepare_row(processor, 0, row, template, rendered_only=True)
    request = prepared.request(sv.Sampling(max_new_tokens=5))
    assert request.inputs is None
    assert request.prompt.count("<image>") == 1
    assert "What is here?" in request.prompt
    assert request.images[0].mode == "RGB"
    assert prepare_row(processor, 0, row, template).request(sv.Sampling()).inputs is not None
    template.close()


@pytest.mark.parametrize("folder", [CaptionFolder, ScoreFolder])
def test_a_job_of_an_earlier_version_is_resumed_with_the_native_engine_only(folder, tmp_path):
    settings = {
        "name": "job",
        "model": {"path": "m"},
        "input": {"source": "s"},
        "storage": str(tmp_path),
    }
    config = CaptionConfig.model_validate(settings)
    before = config.model_dump(mode="json")
    for name in ("backend", "engine_kwargs"):
        del before["engine"][name]
    work = tmp_path / "job" / ("captions" if folder is CaptionFolder else "answers/full/x")
    work.mkdir(parents=True)
    (work / "000000.parquet").touch()
    (tmp_path / "job" / "run.json").write_text(json.dumps({"config": before}))
    job = folder(tmp_path, "job")
    with job.claimed():
        assert job.resume(config)
        assert job.resume(CaptionConfig.model_validate({**settings, "engine": {"max_sequences": 2}}))
        with pytest.raises(ConfigError, match=r'engine\.backend: was "native", now "vllm"'):
            job.resume(CaptionConfig.model_validate({**settings, "engine": {"backend": "vllm"}}))
    shutil.rmtree(tmp_path / "job")
