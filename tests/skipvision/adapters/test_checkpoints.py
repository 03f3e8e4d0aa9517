"""Checkpoints of `Trainer`: what their users load, with the callback and without it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from skipvision import AdapterError, ConfigError, SkipConfig, attach, attachment_of, load_adapter
from skipvision.adapters.checkpoints import SkipVisionCallback
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava

CONFIG = SkipConfig(retained=4, skipped=5)
LORA = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")
INPUTS = tiny_inputs([[3, "image", 6]])


def row():
    labels = INPUTS["input_ids"].masked_fill(INPUTS["input_ids"] == IMAGE_TOKEN, -100)
    decoded = torch.zeros_like(labels, dtype=torch.bool)
    decoded[:, -5:] = True
    return {**INPUTS, "labels": labels, "skip_vision_decoded": decoded, "use_cache": False}


def trained(folder, *, lora=True, callbacks=()):
    model = tiny_llava()
    model = get_peft_model(model, LORA) if lora else model
    attach(model, CONFIG)
    settings = TrainingArguments(
        str(folder), max_steps=2, save_steps=2, learning_rate=0.1, use_cpu=True, report_to=[],
        remove_unused_columns=False, per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    collate = {"data_collator": lambda rows: rows[0], "callbacks": list(callbacks)}
    Trainer(model, settings, train_dataset=[row()] * 2, **collate).train()
    return model.eval(), folder / "checkpoint-2"


@torch.no_grad()
def logits(model):
    return model(**INPUTS, use_cache=False).logits


def check(loaded, model):
    assert attachment_of(loaded).config == CONFIG
    assert attachment_of(loaded).summary.score.weight.abs().max() > 0.01, "the trained summary layer"
    torch.testing.assert_close(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("written", [True, False], ids=["callback", "config given"])
def test_a_checkpoint_is_loaded_as_it_was_trained(tmp_path, written):
    model, folder = trained(tmp_path, callbacks=[SkipVisionCallback()] if written else [])
    if not written:
        with pytest.raises(
            AdapterError, match=r"no skip_config.json; it is a PEFT checkpoint. Call .*config="
        ):
            load_adapter(tiny_llava(), folder)
    check(load_adapter(tiny_llava(), folder, config=None if written else CONFIG), model)
    check(load_adapter(tiny_llava(), folder, config=CONFIG), model)
    with pytest.raises(AdapterError):
        load_adapter(tiny_llava(), folder, config=CONFIG.model_copy(update={"summary_tokens": 2}))
    with pytest.raises(AdapterError):
        load_adapter(tiny_llava(), folder, config=CONFIG.model_copy(update={"summary_tokens": 0}))


def test_peft_alone_loses_the_summary_layer_and_attach_says_what_to_do(tmp_path):
    model, folder = trained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_llava(), str(folder))
    with pytest.raises(ConfigError, match=r"load_adapter\(model, folder, config=\.\.\.\), which also reads"):
        attach(alone, CONFIG)
    check(load_adapter(tiny_llava(), folder, config=CONFIG), model)


def test_a_checkpoint_of_a_bare_model(tmp_path):
    model, folder = trained(tmp_path, lora=False, callbacks=[SkipVisionCallback()])
    base = tiny_llava(seed=9)
    base.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if "skip_summary" not in name}
    )
    check(load_adapter(base, folder), model)
    check(load_adapter(type(base).from_pretrained(folder), folder), model)
    untrained = tiny_llava()
    untrained.config.name_or_path = str(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"is a checkpoint of a whole model.*from_pretrained\("):
        load_adapter(untrained, folder)
    assert attachment_of(untrained) is None


def test_a_checkpoint_trained_without_a_summary_layer(tmp_path):
    get_peft_model(tiny_llava(), LORA).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="does not fit the adapter's settings"):
        load_adapter(tiny_llava(), tmp_path, config=CONFIG)
    load_adapter(tiny_llava(), tmp_path, config=CONFIG.model_copy(update={"summary_tokens": 0}))


def test_the_callback_needs_an_attached_model(tmp_path):
    settings = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
    trainer = Trainer(tiny_llava(), settings, train_dataset=[row()], callbacks=[SkipVisionCallback()])
    with pytest.raises(ConfigError, match="has no Skip-Vision attached"):
        trainer.train()
