"""What the pages promise about TRL, with its `SFTTrainer`, images and the labels of its collator."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from skipvision.adapters.checkpoints import SkipVisionCallback

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
datasets = pytest.importorskip("datasets", reason="trl and datasets are not installed")
trl = pytest.importorskip("trl", reason="trl and datasets are not installed")

CONFIG = sv.SkipConfig(retained=4, skipped=6, summary_tokens=2)
LORA = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")


def rows() -> Any:
    """Questions about images and their answers, as conversations in TRL's format."""
    colours = ["red", "blue", "green", "yellow"]
    question = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}],
    }
    return datasets.Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (64, 48), colour)],
                "messages": [
                    question,
                    {"role": "assistant", "content": [{"type": "text", "text": colour}]},
                ],
            }
            for colour in colours
        ]
    )


def attached(folder: Path) -> Any:
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), LORA)
    sv.attach(model, CONFIG)
    return model


def train(model: Any, processor: Any, output: Path, **options: Any) -> tuple[Any, list[str]]:
    """Train two steps; return the trainer and the warnings of this project."""
    arguments = trl.SFTConfig(
        str(output), max_steps=2, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows(), processing_class=processor, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(one.message) for one in caught]


@torch.no_grad()
def logits(model: Any, processor: Any) -> torch.Tensor:
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[text], images=[Image.new("RGB", (64, 48), "red")], return_tensors="pt")
    return model.eval()(**inputs, use_cache=False).logits


@pytest.fixture
def processor(tiny_model: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_model)


def test_lora_and_summary_layer_are_trained_and_the_checkpoint_is_an_adapter(tiny_model, processor, tmp_path):
    model = attached(tiny_model)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    assert any("summary" in name for name in before)
    _, told = train(model, processor, tmp_path, callbacks=[SkipVisionCallback()])
    after = dict(model.named_parameters())
    unchanged = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not [name for name in unchanged if "lora_B" in name or "summary" in name]
    assert [line for line in told if "frozen" in line] == []
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    loaded = sv.load_adapter(base, tmp_path / "checkpoint-2")
    assert sv.attachment_of(loaded).config == CONFIG
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor))


def test_a_checkpoint_without_the_callback_is_loaded_with_its_config(tiny_model, processor, tmp_path):
    model = attached(tiny_model)
    train(model, processor, tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    loaded = sv.load_adapter(base, tmp_path / "checkpoint-2", config=CONFIG)
    torch.testing.assert_close(logits(loaded, processor), logits(model, processor))


def test_training_through_peft_config_warns_of_a_frozen_summary_layer(tiny_model, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    sv.attach(model, CONFIG)
    _, told = train(model, processor, tmp_path, peft_config=LORA)
    assert [line for line in told if "summary layer" in line and "froze" in line]


def test_labels_of_the_default_collator_at_placeholders_are_reported(tiny_model, processor, tmp_path):
    model = attached(tiny_model)
    trainer, told = train(model, processor, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    placeholder = processor.tokenizer.convert_tokens_to_ids("<image>")
    labelled = bool((batch["labels"][batch["input_ids"] == placeholder] != -100).any())
    assert labelled == any("placeholders" in line for line in told)
