"""Mistakes in training that would otherwise show only in its result: each is warned of once, or refused."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from skipvision import InputError, SkipConfig, attach
from skipvision.testing.llava import IMAGE_TOKEN, tiny_inputs, tiny_llava

CONFIG = SkipConfig(retained=4, skipped=5)
LORA = LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")
INPUTS = tiny_inputs([[3, "image", 6]])
IDS = INPUTS["input_ids"]
LABELS = IDS.masked_fill(IDS == IMAGE_TOKEN, -100)
ANSWER = torch.arange(IDS.shape[1])[None] >= IDS.shape[1] - 4


def step(model, *, labels=LABELS, mask=ANSWER, **options):
    return model(**INPUTS, labels=labels, skip_vision_decoded=mask, use_cache=False, **options)


def warned(function):
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in raised]


# ---------------------------------------------------------------------------------- frozen summary layer


def attached_before_peft():
    model = tiny_llava()
    attach(model, CONFIG)
    return get_peft_model(model, LORA)


def frozen_by_hand():
    model = tiny_llava()
    attach(model, CONFIG).summary.requires_grad_(False)
    return model


def attached_after_peft():
    model = get_peft_model(tiny_llava(), LORA)
    attach(model, CONFIG)
    return model


def without_summary():
    model = tiny_llava()
    attach(model, CONFIG.model_copy(update={"summary_tokens": 0}))
    return get_peft_model(model, LORA)


def all_frozen():
    model = tiny_llava()
    attach(model, CONFIG)
    return model.requires_grad_(False)


@pytest.mark.parametrize("make", [attached_before_peft, frozen_by_hand])
def test_a_frozen_summary_layer_is_reported_at_the_first_training_call(make):
    model = make().train()
    first, second = warned(lambda: step(model)), warned(lambda: step(model))
    assert len(first) == 1
    assert first[0].startswith("the summary layer is frozen while other weights train")
    assert "Call get_peft_model first, then attach" in first[0]
    assert second == []


@pytest.mark.parametrize("make", [attached_after_peft, without_summary, all_frozen])
def test_other_trainings_and_evaluation_are_silent(make):
    model = make()
    assert warned(lambda: step(model.train())) == []
    model = attached_before_peft()
    with torch.no_grad():
        assert warned(lambda: step(model)) == []


def test_a_trainer_of_such_a_model_reports_it(tmp_path):
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, per_device_train_batch_size=1,
    )  # fmt: skip
    row = {**INPUTS, "labels": LABELS, "skip_vision_decoded": ANSWER, "use_cache": False}
    trainer = Trainer(
        attached_before_peft(), settings, train_dataset=[row] * 2, data_collator=lambda rows: rows[0]
    )
    frozen = [message for message in warned(trainer.train) if "summary layer is frozen" in message]
    assert len(frozen) == 1


# --------------------------------------------------------------------------------------- labels at images


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        (IDS, "16 of 25 labels are at image placeholders"),
        (LABELS.masked_fill(IDS == IMAGE_TOKEN, 7), "16 of 25 labels"),
        (torch.where(torch.arange(IDS.shape[1]) == 4, IDS, LABELS), "1 of 10 labels"),
    ],
)
def test_labels_at_image_placeholders_are_reported_once(labels, wrong):
    model = attached_after_peft().train()
    first, second = warned(lambda: step(model, labels=labels)), warned(lambda: step(model, labels=labels))
    assert len(first) == 1
    assert wrong in first[0]
    assert f"labels[input_ids == {IMAGE_TOKEN}] = -100" in first[0]
    assert second == []


def test_a_batch_without_images_does_not_use_up_the_check():
    model = attached_after_peft().train()
    text = tiny_inputs([[8]])
    mask = torch.arange(8)[None] >= 4
    call = {"labels": text["input_ids"], "skip_vision_decoded": mask, "use_cache": False}
    assert warned(lambda: model(**text, **call)) == []
    assert len(warned(lambda: step(model, labels=IDS))) == 1


# ---------------------------------------------------------------------------------- masks of generated tokens


@pytest.mark.parametrize("first", [0, 3, 10, 18])
def test_a_mask_of_generated_tokens_that_covers_an_image_is_refused(first):
    model = attached_after_peft()
    mask = torch.arange(IDS.shape[1])[None] >= first
    covered = int((mask & (IDS == IMAGE_TOKEN)).sum())
    with pytest.raises(InputError, match=f"skip_vision_decoded covers {covered} visual tokens"):
        step(model, mask=mask)
    step(model, mask=torch.arange(IDS.shape[1])[None] >= 19)
