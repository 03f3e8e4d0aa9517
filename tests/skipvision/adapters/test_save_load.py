"""An adapter comes back from its folder as it was saved, or is rejected with a reason."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from skipvision import (
    AdapterError,
    SkipConfig,
    attach,
    attachment_of,
    load_adapter,
    read_adapter,
    save_adapter,
)
from skipvision.testing.llava import tiny_inputs, tiny_llava
from tests.skipvision.cases import CONFIGS, ROWS, labels_for, train_summary

CONFIG = SkipConfig(
    retained=5, skipped=4, select="norm", positions="contiguous", summary_tokens=2, size_bias=True
)
FILES = ["adapter_config.json", "adapter_model.safetensors", "skip_config.json", "skip_summary.safetensors"]


def with_lora(model, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )


def fine_tuned(config=CONFIG, seed=0, **options):
    model = with_lora(tiny_llava(**options), seed).eval()
    if config is not None:
        train_summary(attach(model, config).summary)
    return model


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(ROWS)).logits


@pytest.fixture
def saved(tmp_path):
    """(folder, logits of the model that was saved)."""
    model = fine_tuned()
    return save_adapter(model, tmp_path / "adapter"), logits(model)


def test_a_round_trip_gives_the_same_logits(saved):
    folder, expected = saved
    base = tiny_llava()
    before = logits(base)
    model = load_adapter(base, folder)
    assert isinstance(model, PeftModel)
    assert attachment_of(model).config == CONFIG
    assert torch.equal(logits(model), expected)
    attachment_of(model).detach()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(expected, before)


@pytest.mark.filterwarnings("always")
def test_loading_warns_of_nothing(saved, recwarn):
    """PEFT's use of a deprecated property of transformers is not the caller's concern."""
    folder, _ = saved
    model = load_adapter(tiny_llava(), folder)
    load_adapter(model, folder, name="second")
    assert not [str(warning.message) for warning in recwarn]


def test_the_folder_describes_its_content(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".md") == FILES
    assert read_adapter(folder)["skip"] == CONFIG
    written = json.loads((folder / "skip_config.json").read_text())
    assert written["skip"] == CONFIG.model_dump()
    assert written["versions"].keys() == {"torch", "transformers", "peft"}
    assert [path for path in folder.parent.iterdir() if path != folder] == [], "no leftovers"


@pytest.mark.parametrize("name", ["no-summary", "three-summaries", "ffn-ratio"])
def test_every_config_survives_a_round_trip(name, tmp_path):
    model = fine_tuned(CONFIGS[name])
    loaded = load_adapter(tiny_llava(), save_adapter(model, tmp_path / "a"), config=CONFIGS[name])
    assert attachment_of(loaded).config == CONFIGS[name]
    assert torch.equal(logits(loaded), logits(model))
    assert (tmp_path / "a" / "skip_summary.safetensors").exists() == (name != "no-summary")


def test_a_full_token_adapter_attaches_nothing(tmp_path):
    model = fine_tuned(None)
    loaded = load_adapter(tiny_llava(), save_adapter(model, str(tmp_path / "adapter")))
    assert attachment_of(loaded) is None
    assert torch.equal(logits(loaded), logits(model))
    assert read_adapter(tmp_path / "adapter")["skip"] is None


def test_a_summary_alone_can_be_saved(tmp_path):
    model = tiny_llava()
    train_summary(attach(model, CONFIG).summary)
    base = tiny_llava()
    loaded = load_adapter(base, save_adapter(model, tmp_path / "adapter"))
    assert loaded is base
    assert torch.equal(logits(loaded), logits(model))


def test_nothing_to_save(tmp_path):
    with pytest.raises(AdapterError, match="LlavaForConditionalGeneration has neither"):
        save_adapter(tiny_llava(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_trainable", [False, True])
def test_is_trainable_decides_which_weights_require_gradients(saved, is_trainable):
    folder, expected = saved
    model = load_adapter(tiny_llava(), folder, is_trainable=is_trainable)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trainable) == is_trainable
    assert any("skip_summary" in name for name in trainable) == is_trainable
    assert all("lora" in name or "skip_summary" in name for name in trainable)
    if is_trainable:
        inputs = tiny_inputs(ROWS)
        model(**inputs, labels=labels_for(inputs)).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model.eval()), expected)


# ---------------------------------------------------------------------------------- rejections


@pytest.mark.parametrize(
    ("inside", "remedy"),
    [
        (None, "there is no such folder"),
        ("notes.txt", "save adapters with save_adapter"),
        ("checkpoint-2/adapter_config.json", "choose a folder in it: checkpoint-2"),
    ],
)
def test_a_folder_without_an_adapter(tmp_path, inside, remedy):
    folder = tmp_path / "nowhere"
    if inside is not None:
        (folder / inside).parent.mkdir(parents=True)
        (folder / inside).touch()
    message = rf"nowhere is not a Skip-Vision adapter: it has no skip_config\.json; {remedy}"
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_llava(), folder)


def test_another_skip_config_than_expected(saved):
    folder, _ = saved
    expected = CONFIG.model_copy(update={"retained": 7, "merge": "pool"})
    with pytest.raises(AdapterError, match="retained is 5, not 7, merge is 'similarity', not 'pool'"):
        load_adapter(tiny_llava(), folder, config=expected)


def test_a_full_token_adapter_where_a_skip_config_is_expected(tmp_path):
    folder = save_adapter(fine_tuned(None), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"it has none \(full tokens\), not SkipConfig"):
        load_adapter(tiny_llava(), folder, config=CONFIG)


def test_a_base_model_of_another_width(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match=r"hidden size 32 .*but this model has 64"):
        load_adapter(tiny_llava(hidden_size=64), folder)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_base_model_of_another_depth(saved, layers):
    """PEFT alone would load half of the adapter, or adapt half of the layers."""
    folder, _ = saved
    with pytest.raises(AdapterError, match="layers"):
        load_adapter(tiny_llava(num_hidden_layers=layers), folder)


def test_a_base_model_whose_layers_have_other_sizes(saved):
    folder, _ = saved
    with pytest.raises(AdapterError, match="does not fit this model"):
        load_adapter(tiny_llava(intermediate_size=96), folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved, name):
    folder, _ = saved
    (folder / name).unlink()
    with pytest.raises(AdapterError, match="adapter"):
        load_adapter(tiny_llava(), folder)


def test_missing_weights_are_not_searched_on_the_internet(saved, monkeypatch):
    """PEFT mistakes a relative folder without weights for the name of a repository."""
    folder, _ = saved
    (folder / "adapter_model.safetensors").unlink()
    folder.rename(folder.with_name("out"))
    monkeypatch.chdir(folder.parent.parent)
    requests = []

    def request(*args, **kwargs):
        requests.append(args)
        raise OSError("no internet in tests")

    for name in ("file_exists", "hf_hub_download"):
        monkeypatch.setattr(f"peft.utils.save_and_load.{name}", request)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        load_adapter(tiny_llava(), f"{folder.parent.name}/out")
    assert requests == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe nonsense", b'{"format": 1, "skip": 7}'])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file(saved, name, content):
    folder, _ = saved
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterError, match="adapter"):
        load_adapter(tiny_llava(), folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "skip_summary.safetensors"])
def test_a_truncated_file(saved, name):
    folder, _ = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="adapter"):
        load_adapter(tiny_llava(), folder)


def test_an_unknown_format(saved):
    folder, _ = saved
    written = json.loads((folder / "skip_config.json").read_text())
    (folder / "skip_config.json").write_text(json.dumps({**written, "format": 2}))
    with pytest.raises(AdapterError, match="has format 2; this version reads format 1"):
        read_adapter(folder)


def test_a_skip_config_with_an_unknown_field(saved):
    folder, _ = saved
    written = json.loads((folder / "skip_config.json").read_text())
    written["skip"]["speed"] = 11
    (folder / "skip_config.json").write_text(json.dumps(written))
    with pytest.raises(AdapterError, match="speed=11: no such field"):
        read_adapter(folder)


def test_a_rejected_summary_leaves_the_base_model_usable(saved):
    folder, _ = saved
    (folder / "skip_summary.safetensors").unlink()
    base = tiny_llava()
    expected, names = logits(base), list(base.state_dict())
    with pytest.raises(AdapterError, match="summary"):
        load_adapter(base, folder)
    assert attachment_of(base) is None
    assert list(base.state_dict()) == names
    assert torch.equal(logits(base), expected)


# ---------------------------------------------------------------------------------- overwriting


def test_saving_again_replaces_the_whole_folder(saved, tmp_path):
    folder, _ = saved
    (folder / "stale.txt").write_text("of the first adapter")
    model = fine_tuned(CONFIGS["no-summary"], seed=1)
    save_adapter(model, folder)
    assert read_adapter(folder)["skip"] == CONFIGS["no-summary"]
    assert not (folder / "skip_summary.safetensors").exists()
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(logits(load_adapter(tiny_llava(), folder)), logits(model))


def test_an_empty_folder_is_filled(tmp_path):
    save_adapter(fine_tuned(), tmp_path)
    assert read_adapter(tmp_path)["skip"] == CONFIG


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="exists and is not an adapter"):
        save_adapter(fine_tuned(), tmp_path / "adapter")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "thesis.txt"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killer", ["save_pretrained", "rename", "rmtree"])
def test_a_kill_while_saving_leaves_a_whole_adapter(saved, killer, monkeypatch):
    """At every moment the folder holds either the old adapter or the new one."""
    folder, expected = saved
    model = fine_tuned(seed=1)
    new = logits(model)

    def die(*args, **kwargs):
        raise Killed

    if killer == "save_pretrained":
        monkeypatch.setattr(PeftModel, "save_pretrained", die)
    elif killer == "rename":
        rename, deaths = Path.rename, []

        def die_at_the_last_step(self, target):
            if Path(target) == folder and not deaths:
                deaths.append(target)
                raise Killed
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", die_at_the_last_step)
        monkeypatch.setattr(Path, "replace", die_at_the_last_step)
    else:
        rmtree = shutil.rmtree

        def die_halfway(path, *args, **kwargs):
            if Path(path) == folder:
                (folder / "adapter_model.safetensors").unlink()
                raise Killed
            return rmtree(path, *args, **kwargs)

        monkeypatch.setattr(shutil, "rmtree", die_halfway)
    with suppress(Killed):
        save_adapter(model, folder)
    monkeypatch.undo()
    loaded = logits(load_adapter(tiny_llava(), folder))
    assert torch.equal(loaded, expected) or torch.equal(loaded, new)


def test_the_umask_decides_who_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save_adapter(fine_tuned(), tmp_path / "adapter")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        path.name: 0o640 for path in folder.iterdir()
    }


def test_a_summary_that_peft_froze_is_warned_about(tmp_path):
    model = tiny_llava()
    attach(model, CONFIG)
    model = with_lora(model)
    with pytest.warns(UserWarning, match="attached before get_peft_model"):
        save_adapter(model, tmp_path / "adapter")
    for parameter in attachment_of(model).summary.parameters():
        parameter.requires_grad_(True)
    save_adapter(model, tmp_path / "adapter")


def test_a_base_model_of_another_name_is_warned_about(saved):
    folder, _ = saved
    description = json.loads((folder / "skip_config.json").read_text())
    description["base_model"] = "/models/one"
    (folder / "skip_config.json").write_text(json.dumps(description))
    model = tiny_llava()
    model.config._name_or_path = "owner/other"
    with pytest.warns(
        UserWarning, match="trained on the base model '/models/one', but this one is 'owner/other'"
    ):
        load_adapter(model, folder)
    moved = tiny_llava()
    moved.config._name_or_path = "/elsewhere/one"
    load_adapter(moved, folder)
