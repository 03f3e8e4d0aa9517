"""What vLLM gets from a job's settings, and what is refused before it starts. vLLM itself is not needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.caption import job as caption
from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionFolder
from pipelines.caption.rows import CaptionRow
from pipelines.caption.stages import prepare_row
from pipelines.data.rows import Message
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from pipelines.engines.templates import TemplateProcess
from pipelines.engines.vllm import pruning
from pipelines.engines.vllm import settings as vllm_settings
from pipelines.engines.vllm.pruning import mapped
from pipelines.engines.vllm.settings import check_settings, engine_arguments, vllm_model
from pipelines.score import job as score
from pipelines.score.config import ScoreConfig
from pipelines.score.folder import ScoreFolder
from skipvision.errors import ConfigError
from skipvision.exporting.read import settings_of
from skipvision.integrations.vllm import plugin
from tests.pipelines.score.tables import PLAIN, png, table

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
SKIP = sv.SkipConfig(retained=4, skipped=0)
FULL = sv.SkipConfig.full()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks that do not need vLLM find it and the plug-in."""
    ours = EntryPoint("skipvision", f"{plugin.__name__}:register", "vllm.general_plugins")
    monkeypatch.setattr(pruning, "entry_points", lambda group: [ours])
    monkeypatch.setattr(vllm_settings, "find_spec", lambda _: True)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


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
        engine_kwargs={
            "dtype": "half",
            "trust_remote_code": True,
            "tensor_parallel_size": 2,
            "mm_processor_kwargs": {"skip": {"retained": 8}},
            "map_skipped": "yes",
        },
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
        "skip.skipped = 4: in vLLM no token can bypass the feed-forward networks: set --skip.retained ",
        "engine.engine_kwargs.mm_processor_kwargs.skip: set skip instead",
        "engine.engine_kwargs.map_skipped = 'yes': expected true or false",
    ):
        assert text in message
    assert "tensor_parallel_size" not in message
    assert ("vLLM is not installed here" in message) is (find_spec("vllm") is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_after": 0}, r"^skip\.drop_after = 0: in vLLM all layers have the same tokens: [^\n]*$"),
        ({"size_bias": True}, r"^skip\.size_bias = true: vLLM's paged attention takes no bias: [^\n]*$"),
        ({"select": "attention"}, r"^skip: select='attention' reads the decoder[^\n]*$"),
    ],
    ids=str,
)
def test_a_skipconfig_that_vllm_cannot_run_is_refused(installed, tiny_model, changes, message):
    skip = sv.SkipConfig(retained=4, skipped=0, **changes)
    with pytest.raises(ConfigError, match=message):
        check_settings(model_at(tiny_model, skip=skip), BackendSection(backend="vllm"))


@pytest.mark.parametrize(
    ("plugins", "version", "message"),
    [
        ("", "0.32.0", "VLLM_PLUGINS='' turns off the plug-in that prunes images: add skipvision"),
        ("one,two", "0.32.0", "VLLM_PLUGINS='one,two' turns off"),
        (None, "0.34.1", "works with vLLM 0.32 up to, not including, 0.34, and this is 0.34.1"),
    ],
)
def test_a_vllm_that_would_not_prune_gets_full_tokens_only(
    installed, monkeypatch, tiny_model, plugins, version, message
):
    settings = BackendSection(backend="vllm")
    check_settings(model_at(tiny_model, skip=SKIP), settings)
    monkeypatch.setenv("VLLM_PLUGINS", "one,skipvision")
    check_settings(model_at(tiny_model, skip=SKIP), settings)
    monkeypatch.setattr(plugin, "_version", lambda: version)
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    check_settings(model_at(tiny_model), settings)
    with pytest.raises(ConfigError, match=message) as refused:
        check_settings(model_at(tiny_model, skip=SKIP), settings)
    assert str(refused.value).startswith("skip: ")


def test_without_the_plugin_images_are_not_pruned(installed, monkeypatch, tiny_model):
    monkeypatch.setattr(pruning, "entry_points", lambda group: [])
    check_settings(model_at(tiny_model), BackendSection(backend="vllm"))
    with pytest.raises(ConfigError, match=r"^skip: vLLM prunes images by the plug-in .* set skip to full$"):
        check_settings(model_at(tiny_model, skip=SKIP), BackendSection(backend="vllm"))


def test_skipped_tokens_are_replaced_as_the_message_says(installed, tiny_model):
    model = model_at(tiny_model, skip=sv.SkipConfig(retained=4, skipped=6, select="norm"))
    with pytest.raises(ConfigError, match=r"to true, or use engine\.backend native$") as refused:
        check_settings(model, BackendSection(backend="vllm"))
    arguments = r"set --skip\.retained (\d+) --skip\.skipped 0 --skip\.select norm "
    (number,) = re.findall(arguments, str(refused.value))
    asked = BackendSection(backend="vllm", engine_kwargs={"map_skipped": True})
    runs = mapped(model, asked)
    assert (runs.skip.retained, runs.skip.skipped, runs.skip.select) == (int(number), 0, "norm")
    assert 4 < runs.skip.retained < 10
    check_settings(runs, asked)
    assert "map_skipped" not in engine_arguments(runs, asked, "float32")
    assert mapped(model, BackendSection(backend="vllm")) is model
    assert mapped(model_at(tiny_model), asked).skip == FULL


WRONG = [
    (
        {"engine_kwargs": {"mm_processor_kwargs": {"skip": "full"}}},
        "engine_kwargs.mm_processor_kwargs.skip: ",
    ),
    pytest.param(
        {"engine_kwargs": {"no_such_argument": 1}},
        "engine.engine_kwargs.no_such_argument: vLLM has no such argument",
        marks=needs_vllm,
    ),
    pytest.param({"engine_kwargs": {"max_model_len": 10**7}}, "max_model_len", marks=needs_vllm),
]


@pytest.mark.parametrize("job", ["caption", "score"])
@pytest.mark.parametrize(("engine", "message"), WRONG)
def test_jobs_report_wrong_settings_before_ray_starts_and_weights_are_merged(
    installed, monkeypatch, tiny_model, adapter, tmp_path, job, engine, message
):
    for module in (caption, score):
        monkeypatch.setattr(module, "ray_session", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(sv, "export", lambda *_, **__: pytest.fail("weights were merged"))
    model = {"path": str(tiny_model), "adapter": str(adapter)}
    common = {"name": "job", "storage": str(tmp_path), "engine": {"backend": "vllm", **engine}}
    run: Callable[[], object]
    if job == "caption":
        sections = {"model": model, "input": {"source": str(tmp_path), "prompt": "what?"}}
        run = partial(caption.run_caption, CaptionConfig.model_validate({**common, **sections}))
    else:
        file = table(tmp_path / "table.tsv", [{"index": 1, "image": png(1), **PLAIN, "answer": "red"}])
        data = [{"name": "mine", "path": str(file), "rule": "exact"}]
        sections = {"systems": {"full": {"model": model}}, "datasets": data}
        run = partial(score.run_score, ScoreConfig.model_validate({**common, **sections}))
    with pytest.raises(ConfigError) as refused:
        run()
    assert message in str(refused.value)


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
