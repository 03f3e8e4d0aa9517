"""The lmms-eval plug-in answers as `generate` does, and runs inside lmms-eval if that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from skipvision.errors import ConfigError, InputError
from skipvision.integrations.lmms_eval.answering import Question, answer, load_engine, request

ROOT = Path(__file__).parents[3]
SKIP = {"retained": 4, "skipped": 4}


def images(count: int) -> list[Image.Image]:
    return [Image.effect_noise((56, 56), 20.0 * (number + 1)).convert("RGB") for number in range(count)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    with load_engine(str(tiny_model), dtype="float32", max_sequences=2, **SKIP) as engine:
        yield engine


def test_answers_match_generate(engine, tiny_model):
    shown = images(3)
    questions = [
        Question(f"What is in image {number}?", [image], {"max_new_tokens": 6, "until": None})
        for number, image in enumerate(shown)
    ]
    answers = answer(engine, questions)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    for number, question in enumerate(questions):
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.context}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=shown[number], text=prompt, return_tensors="pt")
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
        ("No image.", 0, ["text"]),
    ],
)
def test_images_stand_where_the_context_marks_them(context, count, kinds):
    (message,) = request(0, Question(context, images(count), {})).prompt
    assert [part["type"] for part in message["content"]] == kinds


def test_generation_kwargs_are_applied_or_rejected():
    kwargs = {
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 0,
        "top_k": None,
        "num_beams": 1,
        "until": "\n\n",
    }
    sampling = request(0, Question("?", [], {**kwargs, "do_sample": False})).sampling
    assert (sampling.max_new_tokens, sampling.top_p, sampling.stop) == (16, 1, ("\n\n",))
    for unsupported in ({"num_beams": 4}, {"min_p": 0.1}):
        with pytest.raises(ConfigError, match=next(iter(unsupported))):
            request(0, Question("?", [], unsupported))
    with pytest.raises(InputError, match="1 <image>, the task 2 images"):
        request(0, Question("<image> and?", images(2), {}))


def test_skip_full_and_fields_of_skip_config_exclude_each_other(tiny_model):
    with pytest.raises(ConfigError, match="skip=full"):
        load_engine(str(tiny_model), skip="full", retained=4)
    with load_engine(str(tiny_model)) as engine:
        (completion,) = answer(engine, [Question("?", images(1), {"max_new_tokens": 1})]).values()
    assert completion.usage.visual_skipped == 0


def declared_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lmms_eval.models"].items()
    return EntryPoint(name, value, "lmms_eval.models")


def test_the_entry_point_loads_without_lmms_eval():
    assert callable(declared_entry_point().load())
    assert find_spec("skipvision.integrations.lmms_eval.model")


@pytest.mark.slow
def test_an_installed_wheel_has_the_entry_point(tmp_path):
    """In another folder, with nothing of the repository on the path but the wheel."""
    # Building leaves files next to its sources, so it gets a copy.
    source = tmp_path / "source"
    shutil.copytree(ROOT / "skipvision", source / "skipvision")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import skipvision; from importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='lmms_eval.models', name='skipvision')\n"
        "print(skipvision.__file__, found.load().__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    printed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert printed == [str(site / "skipvision" / "__init__.py"), "skipvision.integrations.lmms_eval.plugin"]


def test_lmms_eval_finds_and_runs_the_model(tiny_model):
    lmms_eval = pytest.importorskip("lmms_eval.models.registry_v2")
    from lmms_eval.api.instance import Instance

    registry = lmms_eval.ModelRegistryV2()
    registry.register_manifest(declared_entry_point().load()())
    cls = registry.get_model_class("skipvision")
    model = cls.create_from_arg_string(
        f"pretrained={tiny_model},retained=4,skipped=4,dtype=float32", {"batch_size": 2, "device": "cpu"}
    )
    docs = [{"image": image} for image in images(3)]
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
