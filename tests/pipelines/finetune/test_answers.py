"""The full-token model answers rows once: cached, resumed, and the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import skipvision as sv
from pipelines.data.chat import chat_messages
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.engines.loading import load_base, load_processor
from pipelines.finetune import answers
from pipelines.finetune.answers import answer_rows
from pipelines.finetune.config import FinetuneConfig

TEXT = TrainingRow("text", (), (Message("user", "how many circles"),))


@pytest.fixture(scope="module")
def config(tiny_model: Path, shapes_data: Path) -> FinetuneConfig:
    """A random model ends few answers, so they are drawn and long."""
    return FinetuneConfig.model_validate(
        {
            "name": "run",
            "model": {"path": str(tiny_model)},
            "data": {"train": str(shapes_data / "train.json")},
            "training": {"objective": "distill", "precision": "float32"},
            "answering": {"max_new_tokens": 150, "temperature": 1.0, "engine": {"max_sequences": 4}},
        }
    )


@pytest.fixture(scope="module")
def questions(shapes_data: Path) -> list[TrainingRow]:
    rows = read_training_rows(str(shapes_data / "train.json")).rows[:9]
    return [*(TrainingRow(row.key, row.images, row.messages[:1], row.task, row.source) for row in rows), TEXT]


def texts(answered) -> dict[str, str]:
    return {row.key: row.messages[-1].text for row in answered.rows}


@pytest.mark.slow
def test_answers_are_cached_resumed_and_those_of_the_seed(
    config, questions, tmp_path, monkeypatch, local_ray
):
    monkeypatch.setattr(answers, "_SHARD_ROWS", 4)
    folder = tmp_path / "answers"
    first = answer_rows(config, folder, questions)
    assert len(first.rows) + len(first.rejects) == len(questions)
    assert len(first.rows) >= 1
    assert {reject.kind for reject in first.rejects} <= {"too long", "conversation", "placeholders"}
    files = sorted((folder / "texts").glob("*.parquet"))
    assert len(files) == 3

    # A killed job left two shards; a finished one leaves nothing to do.
    files[1].unlink()
    kept = files[0].stat().st_mtime_ns
    assert texts(answer_rows(config, folder, questions)) == texts(first)
    assert files[0].stat().st_mtime_ns == kept
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_generate", lambda *_: pytest.fail("everything is answered"))
        assert texts(answer_rows(config, folder, questions)) == texts(first)

    other = answer_rows(config.model_copy(update={"seed": 1}), folder, questions)
    assert texts(other) != texts(first)


@pytest.mark.slow
def test_greedy_answers_are_those_of_the_engine_with_full_tokens(config, questions, tmp_path, local_ray):
    """Whether or not they end in time; the adapter and Skip-Vision take no part."""
    answering = config.answering.model_copy(update={"temperature": 0.0, "max_new_tokens": 5})
    config = config.model_copy(update={"answering": answering})
    answer_rows(config, tmp_path / "answers", questions)
    found = answers._shards(tmp_path / "answers").read(0).to_pylist()
    assert sum(line["visual_tokens_skipped"] for line in found) == 0
    processor = load_processor(config.model.path)
    base = load_base(config.model.path, torch.float32, "sdpa", torch.device("cpu"))
    engine = sv.Engine(base, processor, sv.SkipConfig.full())
    requests = [
        sv.Request(
            chat_messages(row.messages, processor),
            [image.open() for image in row.images],
            sampling=sv.Sampling(max_new_tokens=5),
            key=row.key,
        )
        for row in questions
    ]
    expected = {completion.key: completion.text.strip() for completion in engine.run(requests)}
    engine.close()
    assert {line["key"]: line["text"] for line in found} == expected
