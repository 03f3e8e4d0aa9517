"""The base model's training: packed questions are independent, and an interrupted stage resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pipelines.data.collate import IGNORED
from pipelines.shapes.base.card import judged
from pipelines.shapes.base.config import BaseModelConfig
from pipelines.shapes.base.examples import SceneRows, collate_packed, encode_branch, patch_labels
from pipelines.shapes.base.model import train_base_model
from pipelines.shapes.base.parts import build_model, build_processor, build_tokenizer
from pipelines.shapes.base.training import packed_logits, visual_features
from pipelines.shapes.scenes import TASKS, digit_centres, question_for, render, sample_scene

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def parts():
    tokenizer = build_tokenizer(0)
    torch.manual_seed(0)
    return build_model(tokenizer).eval(), build_processor(tokenizer)


def test_a_packed_question_gets_the_logits_it_gets_alone(parts):
    """The reference is the model's own forward pass on the processor's output for image and chat."""
    model, processor = parts
    config = BaseModelConfig(questions=4)
    rows = [SceneRows(config, processor, "validation", i, i + 1, packed=True)[0] for i in range(2)]
    prefix_ids = torch.tensor(processor.tokenizer("USER: ", add_special_tokens=False).input_ids)
    batch = collate_packed(rows, len(prefix_ids) + 256, processor.tokenizer.pad_token_id)
    with torch.no_grad():
        packed, targets = packed_logits(model, batch, visual_features(model, batch.pixel_values), prefix_ids)
        at = 0
        for index in range(2):
            scene, rng = sample_scene(config.seed, "validation", index)
            for task in [TASKS[0], *TASKS[1:4]]:
                question = question_for(scene, task, rng)
                chat = [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": question.prompt}],
                    },
                    {"role": "assistant", "content": question.answer},
                ]
                inputs = processor(
                    images=render(scene), text=processor.apply_chat_template(chat), return_tensors="pt"
                )
                alone = model(**inputs).logits[0]
                answer = processor.tokenizer(f" {question.answer}</s>", add_special_tokens=False).input_ids
                expected = alone[-len(answer) - 1 : -1]
                torch.testing.assert_close(packed[at : at + len(answer)], expected, atol=2e-4, rtol=1e-4)
                assert targets[at : at + len(answer)].tolist() == answer
                at += len(answer)
    assert at == len(targets) == int((batch.targets != IGNORED).sum())


def test_patch_labels_name_the_objects_drawn_there():
    scene, _ = sample_scene(0, "train", 3)
    labels = patch_labels(scene).reshape(16, 16, 4)
    for thing in scene.things:
        x, y = (int(c // 14) for c in thing.centre)
        assert labels[y, x, :3].all()
    for digit, x, y in digit_centres(scene):
        assert labels[int(y // 14), int(x // 14), 3] == int(digit) + 1
    assert (labels[..., 3] > 0).sum() == len(scene.number)


def test_a_branch_has_the_tokens_of_the_chat_template(parts):
    _, processor = parts
    branch = encode_branch(processor.tokenizer, "Read the number.", "347")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the number."}]},
        {"role": "assistant", "content": "347"},
    ]
    whole = processor.tokenizer(processor.apply_chat_template(chat), add_special_tokens=False).input_ids
    assert whole[-len(branch.ids) :] == branch.ids
    assert processor.tokenizer.decode(branch.ids[branch.answer_start :]) == " 347</s>"


def test_the_card_states_a_missed_aim_and_its_reason():
    exact = {"caption": 0.8, "count": 0.7, "shape": 0.99, "overall": 0.83}
    checks = [{"caption": 0.1 * step, "count": 0.69, "shape": 0.9} for step in range(9)]
    verdict = judged(exact, checks)
    assert verdict.startswith("**The aim was 90 % overall; it was missed by 7.0 points (83.0 %).**")
    assert "Below the aim are count 70.0 %, caption 80.0 %." in verdict
    assert "ended too early for caption (+30 points), which still rose" in verdict
    assert "hardly have been enough for count (+0 points)." in verdict
    assert judged({"shape": 0.99, "overall": 0.99}, []) == "The aim was 90 % overall; it was reached."


def test_the_shipped_models_card_states_the_same_verdict():
    card = (ROOT / "models" / "shapes-llava" / "README.md").read_text()
    cells = re.findall(r"^\| \**(\w+)\** \| \**([\d.]+)\** \|$", card, flags=re.MULTILINE)
    shares = {"overall" if task == "all" else task: float(share) / 100 for task, share in cells}
    assert judged(shares, []) in card


@pytest.mark.slow
def test_training_resumes_where_it_stopped_and_writes_a_card(tmp_path):
    def config(**changes: object) -> BaseModelConfig:
        settings = {
            "output": tmp_path / "model",
            "work_dir": tmp_path / "work",
            "vision_images": 8,
            "vision_batch": 4,
            "language_images": 4,
            "language_batch": 2,
            "questions": 3,
            "workers": 0,
            "threads": 1,
            "test_scenes": 2,
        }
        return BaseModelConfig(**{**settings, **changes})

    first = train_base_model(config())
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    again = train_base_model(config())
    assert again["exact_match"] == first["exact_match"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    log = [json.loads(line) for line in (tmp_path / "work" / "language.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2]
    assert "| number |" in (tmp_path / "model" / "README.md").read_text()
