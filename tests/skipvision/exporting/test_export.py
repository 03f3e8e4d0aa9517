"""An exported folder answers as base model and adapter do, and loads as an ordinary model."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from skipvision import AdapterError, ConfigError, SkipConfig
from skipvision.exporting.names import rename_weights
from skipvision.exporting.read import SUMMARY_FILE, exported_settings, exported_summary
from skipvision.testing.families import tiny_model as tiny_of_family
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import ROWS, train_summary
from tests.skipvision.engine.test_adapter_kinds import ALONE, OTHERS, REFUSED, SHARED, lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
SKIP = SkipConfig(retained=5, skipped=4, summary_tokens=2, size_bias=True)
KINDS = {**SHARED, **ALONE, **OTHERS}
BIASES = KINDS.pop("LoRA with biases")  # the layers of a Llama have none to merge them into
FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", SUMMARY_FILE),
    *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """A folder with `tiny_llava` and a processor."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llava().save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, folder)
    return folder


def saved(kind, folder, skip=SKIP, model=None):
    """Save an adapter of a kind whose weights all matter."""
    torch.manual_seed(1)
    model = get_peft_model(model or tiny_llava(), kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("modules_to_save", "ln_tuning", "token_adapter", "vera_lambda")):
                weight.add_(torch.randn_like(weight) / 2)
    if skip is not None:
        train_summary(sv.attach(model, skip).summary)
    return sv.save_adapter(model, folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved(lora(), tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture(scope="module")
def exported(base, adapter, tmp_path_factory):
    return sv.export(base, adapter, tmp_path_factory.mktemp("exported") / "model", numbers={"accuracy": 0.5})


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(ROWS)).logits


def answers(model):
    row = tiny_inputs([[3, "image", 4]])
    return model.generate(**row, max_new_tokens=12, do_sample=False).tolist()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------- what is in the folder


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_merged(name, base, tmp_path):
    folder = saved(KINDS[name], tmp_path / "adapter")
    out = sv.export(base, folder, tmp_path / "model")
    expected, model = sv.load_adapter(tiny_llava(), folder), sv.from_exported(out)
    assert sv.attachment_of(model).config == SKIP
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert answers(model) == answers(expected)
    assert not torch.allclose(logits(tiny_llava()), logits(expected), atol=1e-2), "it would prove nothing"


def test_the_folder_is_an_ordinary_model(exported, adapter, recwarn, caplog):
    assert files_of(exported) == FILES
    with caplog.at_level("WARNING", logger="transformers"):
        model, info = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert not caplog.records
    assert not recwarn.list
    full = sv.load_adapter(tiny_llava(), adapter)
    sv.attachment_of(full).detach()
    torch.testing.assert_close(logits(model), logits(full), rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(exported).chat_template


def test_its_config_names_skip_vision(exported):
    content = json.loads((exported / "config.json").read_text())
    assert content["skip_vision"] == {
        "format": 1,
        "skip": SKIP.model_dump(),
        "summary": SUMMARY_FILE,
        "hidden_size": 32,
        "layers": 3,
    }
    assert exported_settings(content).skip == SKIP
    assert exported_settings({"model_type": "llava"}) is None


def test_its_files_have_the_permissions_of_the_umask(exported):
    umask = os.umask(0)
    os.umask(umask)
    for path in exported.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_its_card_has_the_numbers_and_no_path(exported, base, adapter):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: image-text-to-text\n")
    assert "| accuracy | 0.5 |" in card
    assert "retained: 5" in card
    assert "prefill FLOPs" in card
    assert str(base.parent) not in card
    assert str(adapter.parent) not in card


def test_an_adapter_of_full_tokens_attaches_nothing(base, tmp_path):
    out = sv.export(base, saved(lora(), tmp_path / "adapter", skip=None), tmp_path / "model")
    assert files_of(out) == FILES - {SUMMARY_FILE}
    assert json.loads((out / "config.json").read_text())["skip_vision"]["skip"] is None
    assert sv.attachment_of(sv.from_exported(out)) is None


def test_a_model_without_adapter_is_exported_with_a_config(base, tmp_path):
    out = sv.export(base, None, tmp_path / "model", config=SKIP)
    expected = tiny_llava()
    sv.attach(expected, SKIP)
    assert torch.equal(logits(sv.from_exported(out)), logits(expected))


def test_another_config_keeps_the_summary_layer(base, adapter, tmp_path):
    other = SkipConfig(retained=8, skipped=0, summary_tokens=2, select="norm")
    model = sv.from_exported(sv.export(base, adapter, tmp_path / "model", config=other))
    expected = sv.load_adapter(tiny_llava(), adapter)
    with sv.attachment_of(expected).using(other):
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_an_exported_model_can_be_tuned_and_exported_again(exported, tmp_path):
    second = saved(lora(), tmp_path / "second", model=AutoModelForImageTextToText.from_pretrained(exported))
    out = sv.export(exported, second, tmp_path / "model")
    expected = sv.load_adapter(AutoModelForImageTextToText.from_pretrained(exported), second)
    torch.testing.assert_close(logits(sv.from_exported(out)), logits(expected), rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once(base, adapter, tmp_path):
    out = sv.export(base, adapter, tmp_path / "model", dtype="bfloat16")
    model = AutoModelForImageTextToText.from_pretrained(out)
    exact = sv.load_adapter(tiny_llava(dtype=torch.bfloat16), adapter, is_trainable=True)
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = exact.get_base_model().get_submodule(name)
    expected = (layer.base_layer.weight.float() + layer.get_delta_weight("default")).bfloat16()
    assert torch.equal(model.get_submodule(name).weight, expected)
    assert load_file(out / SUMMARY_FILE)["score.weight"].dtype == torch.float32


# ---------------------------------------------------------------------------------- names of the weights


TOWERS = {"llava", "llava_next", "gemma3", "llava_onevision", "vipllava", "paligemma"}
STARTS = {
    "llava": "language_model.lm_head. language_model.model. multi_modal_projector. "
    "vision_tower.vision_model.",
    "llava_next": "image_newline language_model.lm_head. language_model.model. multi_modal_projector. "
    "vision_tower.vision_model.",
    "qwen2_5_vl": "lm_head. model.embed_tokens. model.layers. model.norm. visual.",
    "qwen3_vl": "lm_head. model.language_model. model.visual.",
    "internvl": "language_model.lm_head. language_model.model. multi_modal_projector. vision_tower.",
}
"""How the names begin that vLLM 0.32 reads."""


@pytest.mark.parametrize("family", sorted(TOWERS | STARTS.keys()))
def test_both_sides_read_the_names(family, tmp_path):
    model = tiny_of_family(family)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    rename_weights(tmp_path, model.config)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert name in load_file(tmp_path / file)
    if family in STARTS:
        assert all(name.startswith(tuple(STARTS[family].split())) for name in index), sorted(index)
    if family in TOWERS:
        assert all("vision_tower.vision_model." in name for name in index if "vision_tower" in name)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_cannot_be_merged(name, base, adapter, tmp_path):
    kind, reason = REFUSED[name]
    shutil.copytree(adapter, tmp_path / "adapter")
    kind.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError) as refused:
        sv.export(base, tmp_path / "adapter", tmp_path / "model")
    assert reason in str(refused.value) or "has peft_type 'PREFIX" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_biases_for_layers_without_one_are_refused(base, tmp_path):
    folder = saved(BIASES, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"this LORA adapter cannot be merged: .*base layer has no bias"):
        sv.export(base, folder, tmp_path / "model")


def test_weights_that_are_not_finite_are_refused(base, tmp_path):
    folder = saved(lora(), tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"after the merge, .* not finite"):
        sv.export(base, folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "kind",
    [lora(r".*(lm_head|q_proj)"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])],
    ids=["layer", "whole"],
)
def test_an_adapter_of_tied_weights_is_refused(kind, base, tmp_path):
    tied = tmp_path / "tied"
    shutil.copytree(base, tied)
    model = tiny_llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    folder = saved(kind, tmp_path / "adapter", model=AutoModelForImageTextToText.from_pretrained(tied))
    with pytest.raises(AdapterError, match=r"it changes lm_head, whose weights the model also uses"):
        sv.export(tied, folder, tmp_path / "model")


def test_all_problems_are_reported_together(base, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    with pytest.raises(ConfigError) as refused:
        sv.export(tmp_path / "none", tmp_path / "no-adapter", tmp_path / "model", dtype="int3")
    for text in (
        "4 problems",
        "dtype='int3'",
        "model exists, and is not",
        "none: there is no such folder",
        "is not a Skip-Vision",
    ):
        assert text in str(refused.value)


@pytest.mark.parametrize("path", ["/nope", "./nope", "models/nope", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(path, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{path}: there is no such folder: give the folder of a model"):
        sv.export(path, None, tmp_path / "exported", config=sv.SkipConfig())


def test_without_adapter_and_config_there_is_nothing_to_export(base, tmp_path):
    with pytest.raises(ConfigError, match="nothing to export"):
        sv.export(base, None, tmp_path / "model")


def test_a_config_that_needs_another_summary_layer_is_refused(base, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"summary_tokens=1, but the adapter .* was trained with 2"):
        sv.export(base, adapter, tmp_path / "model", config=SkipConfig(retained=5, skipped=0))


def test_a_config_that_the_model_cannot_run_is_refused(base, adapter, tmp_path):
    with pytest.raises(ConfigError, match="needs a multi-view family"):
        sv.export(base, None, tmp_path / "model", config=SkipConfig(select="views"))


def test_quantised_and_pickled_weights_are_refused(base, adapter, tmp_path):
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        sv.export(quantised, adapter, tmp_path / "model")
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        sv.export(pickled, adapter, tmp_path / "model")


# ---------------------------------------------------------------------------------------------- the place


def test_only_an_exported_model_is_overwritten(base, adapter, tmp_path):
    out = sv.export(base, adapter, tmp_path / "model")
    before = (out / "config.json").stat().st_ino
    with pytest.raises(ConfigError, match="is not overwritten"):
        sv.export(base, adapter, out)
    sv.export(base, adapter, out, overwrite=True)
    assert (out / "config.json").stat().st_ino != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="holds no exported model"):
        sv.export(base, adapter, tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        sv.export(base, adapter, tmp_path / "other" / "file" / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_failed_export_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("skipvision.exporting.write.model_card", fail)
    with pytest.raises(OSError, match="full"):
        sv.export(base, adapter, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_replaced(base, adapter, tmp_path):
    left = tmp_path / ".model.partial"
    (left / "sub").mkdir(parents=True)
    (left / "model.safetensors").touch()
    out = sv.export(base, adapter, tmp_path / "model")
    assert files_of(out) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_exports_to_one_place(base, adapter, tmp_path):
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is being written by another process"):
        sv.export(base, adapter, tmp_path / "model")
    os.close(descriptor)
    sv.export(base, adapter, tmp_path / "model")


KILLED = """
import os, signal, sys
import skipvision as sv
from skipvision.exporting import write

write.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sv.export(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_half_model(base, adapter, tmp_path):
    command = [sys.executable, "-c", KILLED, str(base), str(adapter), str(tmp_path / "model")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[3], timeout=120, check=False)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [".model.partial"]
    assert files_of(sv.export(base, adapter, tmp_path / "model")) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------------------------------------- damaged ones


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "has format 2"),
        ({"skip": {"retained": -1}}, "retained=-1"),
        ({"skip": 3}, "cannot be read"),
        ({"hidden_size": "wide"}, "cannot be read"),
        ({"hidden_size": 16}, "does not fit"),
        ({"summary": "../../secret.safetensors"}, "names the summary layer '../../secret"),
        ({"summary": None}, "names the summary layer None"),
    ],
)
def test_a_damaged_entry_is_refused(change, says, exported, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    content = json.loads((folder / "config.json").read_text())
    content["skip_vision"] |= change
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=says):
        sv.from_exported(folder)


def test_a_missing_summary_layer_and_a_base_model_are_refused(exported, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    (folder / SUMMARY_FILE).unlink()
    with pytest.raises(AdapterError, match="summary"):
        sv.from_exported(folder)
    with pytest.raises(AdapterError, match="does not name Skip-Vision"):
        sv.from_exported(base)
    with pytest.raises(ConfigError, match=r"none: there is no such folder"):
        sv.from_exported(tmp_path / "none")


def test_the_summary_layer_is_read_without_the_model(exported):
    settings = exported_settings(json.loads((exported / "config.json").read_text()))
    layer = exported_summary(exported, settings)
    attached = sv.attachment_of(sv.from_exported(exported)).summary
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight, attached.state_dict()[name])
    assert not any(weight.requires_grad for weight in layer.parameters())
