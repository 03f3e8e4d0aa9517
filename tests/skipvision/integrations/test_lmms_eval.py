"""The plug-in for lmms-eval: its answers are the model's own, and lmms-eval, where installed, takes it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from skipvision.errors import ConfigError, InputError
from skipvision.integrations.lmms_eval.answering import Question, answer, load_engine, request

ROOT = Path(__file__).parents[2]
SKIP = {"retained": 4, "skipped": 4}


def images(count: int) -> list[Image.Image]:
    return [Image.effect_noise((56, 56), 20.0 * (number + 1)).convert("RGB") for number in range(count)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    with load_engine(str(tiny_model), dtype="float32", max_sequences=2, **SKIP) as engine:
        yield engine


def test_answers_are_those_of_generate(engine, tiny_model):
    pictures = images(3)
    questions = [
        Question(f"What is in picture {number}?", [picture], {"max_new_tokens": 6, "until": None})
        for number, picture in enumerate(pictures)
    ]
    answers = answer(engine, questions)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.context}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=pictures[number], text=prompt, return_tensors="pt")
        with torch.no_grad(), sv.attach(model, sv.SkipConfig(**SKIP)):
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert answers[number].text == expected
        assert answers[number].usage.visual_skipped == 4


@pytest.mark.parametrize(
    ("context", "count", "kinds"),
    [
        ("Compare them.", 2, ["image", "image", "text"]),
        ("Before: <image>\nAfter: <image>", 2, ["text", "image", "text", "image"]),
        ("No picture.", 0, ["text"]),
    ],
)
def test_images_are_where_the_context_has_them(context, count, kinds):
    (message,) = request(0, Question(context, images(count), {})).prompt
    assert [part["type"] for part in message["content"]] == kinds


def test_what_tasks_say_of_generation_is_obeyed_or_refused():
    asked = {
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 0,
        "top_k": None,
        "num_beams": 1,
        "until": "\n\n",
    }
    sampling = request(0, Question("?", [], {**asked, "do_sample": False})).sampling
    assert (sampling.max_new_tokens, sampling.top_p, sampling.stop) == (16, 1, ("\n\n",))
    for refused in ({"num_beams": 4}, {"min_p": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(refused))):
            request(0, Question("?", [], refused))
    with pytest.raises(InputError, match="1 <image>, the task 2 images"):
        request(0, Question("<image> and?", images(2), {}))


def test_skipping_is_named_in_one_way_only(tiny_model):
    with pytest.raises(ConfigError, match="skip=full"):
        load_engine(str(tiny_model), skip="full", retained=4)
    with load_engine(str(tiny_model)) as engine:
        (completion,) = answer(engine, [Question("?", images(1), {"max_new_tokens": 1})]).values()
    assert completion.usage.visual_skipped == 0


def test_lmms_eval_finds_and_runs_the_model(tiny_model):
    lmms_eval = pytest.importorskip("lmms_eval.models.registry_v2")
    from lmms_eval.api.instance import Instance

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (where,) = project["entry-points"]["lmms_eval.models"].values()
    module, _, name = where.partition(":")
    manifest = getattr(__import__(module, fromlist=[name]), name)()
    registry = lmms_eval.ModelRegistryV2()
    registry.register_manifest(manifest)
    cls = registry.get_model_class("skipvision")
    model = cls.create_from_arg_string(
        f"pretrained={tiny_model},retained=4,skipped=4,dtype=float32", {"batch_size": 2, "device": "cpu"}
    )
    docs = [{"image": picture} for picture in images(3)]
    model.task_dict = {"task": {"test": docs}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(
                f"Question {n}?",
                {"max_new_tokens": 4},
                lambda doc: [doc["image"]],
                n,
                "task",
                "test",
            ),
            idx=n,
            metadata={"task": "task", "doc_id": n, "repeats": 1},
        )
        for n in range(3)
    ]
    results = model.generate_until(requests)
    assert [result.token_counts.output_tokens <= 4 for result in results] == [True] * 3
    alone = model.generate_until(requests[2:])
    assert alone[0].text == results[2].text
