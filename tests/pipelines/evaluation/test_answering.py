"""An engine's answers to training rows: the same as those of `model.generate`, and what happens on errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from pipelines.data.images import FileImage, ImageError
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.evaluation.answering import answer_rows, log_probability, request_for
from pipelines.evaluation.exact_match import evaluate_exact_match
from skipvision.engine import Sampling

SKIP = sv.SkipConfig(retained=4, skipped=4, summary_tokens=2)


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[sv.Engine]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64)
    with sv.Engine(model, AutoProcessor.from_pretrained(tiny_model), SKIP, max_sequences=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def rows(shapes_data: Path) -> list[TrainingRow]:
    rows = list(read_training_rows(str(shapes_data / "validation.json")).rows)
    earlier = (*rows[0].messages, Message("user", "And the number?"), Message("assistant", "42"))
    text_only = TrainingRow("text", (), (Message("user", "How many?"), Message("assistant", "none")), "count")
    return [*rows, TrainingRow("turns", rows[0].images, earlier, "number"), text_only]


@pytest.mark.parametrize("skip", [None, "full", SKIP.model_copy(update={"retained": 2})])
def test_answers_are_those_of_generate_in_the_order_of_rows(engine, rows, tiny_model, skip):
    answers = answer_rows(engine, rows, skip=skip, max_new_tokens=6)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64)
    with sv.attach(model, {None: SKIP, "full": sv.SkipConfig.full()}.get(skip, skip)):
        expected = [
            # alone, because a batch cuts wrong answers at other lengths
            evaluate_exact_match(model, AutoProcessor.from_pretrained(tiny_model), [row], max_new_tokens=6)[0]
            for row in rows
        ]
    assert answers == expected
    assert len({answer.answer for answer in answers}) > 1
    assert all(answer.log_probability < 0 for answer in answers)


def test_the_log_probability_of_an_answer_is_that_of_the_model(engine, rows, tiny_model):
    """The end of an answer counts; an answer that is cut off has none."""
    request = request_for(rows[0].messages[:-1], rows[0].images, engine.processor, Sampling(max_new_tokens=4))
    request = replace(engine.prepare(request), skip="full")
    [completion] = engine.run([request])
    assert log_probability(completion) is None
    [completion] = engine.run([replace(request, sampling=Sampling(max_new_tokens=4, logprobs=0))])
    ids = torch.tensor([completion.choices[0].token_ids])
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64).eval()
    prompt = request.inputs["input_ids"]
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([prompt, ids], dim=1), pixel_values=request.inputs["pixel_values"].double()
        ).logits[:, prompt.shape[1] - 1 : -1]
    chosen = logits.log_softmax(dim=2).gather(2, ids[..., None])
    assert log_probability(completion) == pytest.approx(chosen.sum().item(), rel=1e-5)


def test_an_unreadable_image_is_an_error_and_leaves_the_engine_idle(engine, rows, tmp_path):
    lost = replace(rows[1], images=(FileImage(str(tmp_path / "none.png")),))
    with pytest.raises(ImageError, match=r"none\.png"):
        answer_rows(engine, [rows[0], lost, *rows[2:]], max_new_tokens=6)
    assert not engine.busy
    assert len(answer_rows(engine, rows[:2], max_new_tokens=6)) == 2


def test_a_skip_config_that_the_engine_refuses_is_an_error(engine, rows):
    with pytest.raises(sv.ConfigError, match="summary_tokens=3"):
        answer_rows(engine, rows, skip=SKIP.model_copy(update={"summary_tokens": 3}))
    assert not engine.busy
