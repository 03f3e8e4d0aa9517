"""The rows of a run: long ones are rejected, and `rejects.jsonl` lists each row once with its data sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.caption.folder import CaptionShards
from pipelines.caption.rows import Caption
from pipelines.data.images import MissingImageError
from pipelines.data.rejects import LateRejects
from pipelines.data.rows import DATA_SETS, Reject, TrainingRow
from pipelines.evaluation.exact_match import evaluate_exact_match
from pipelines.finetune.answers import Answered, read_answers
from pipelines.finetune.batches import row_lengths
from pipelines.finetune.checks import check_model
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.data import FinetuneData, keep_choice, read_data
from pipelines.finetune.folder import FinetuneFolder
from skipvision.errors import DataError


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_model)


def row(name: str, *turns: str, **fields: object) -> dict[str, object]:
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": name, "conversations": conversation, **fields}


GOOD, BROKEN = row("good", "What?", "red"), row("broken", "What?")


class Run:
    """A run on small files."""

    def __init__(self, model: Path, tmp_path: Path, processor: Any) -> None:
        self.model, self.tmp_path, self.processor = model, tmp_path, processor
        self.folder = FinetuneFolder(tmp_path / "runs", "run")
        self.folder.path.mkdir(parents=True)

    def file(self, name: str, *rows: dict[str, object]) -> str:
        path = self.tmp_path / name
        path.write_text(json.dumps(rows))
        return str(path)

    def config(
        self, train: str, validation: str | None = None, objective: str = "answers", **data: object
    ) -> FinetuneConfig:
        section = {"train": train, "validation": validation, **data}
        training = {"objective": objective}
        return FinetuneConfig.model_validate(
            {"name": "run", "model": {"path": str(self.model)}, "data": section, "training": training}
        )

    def read(self, config: FinetuneConfig, positions: int | None = None) -> FinetuneData:
        return read_data(config, self.folder, self.processor, positions, self.answer)

    def answer(self, rows: Sequence[TrainingRow]) -> Answered:
        """Keep answers where the engines keep theirs; the row's key says which."""
        answers = {
            "long": Caption("long", "red and", "length"),
            "empty": Caption("empty", "", "stop"),
            "placeholder": Caption("placeholder", "<image>", "stop"),
            "gone": Caption("gone", error_kind="missing image", error="no such file"),
            "failed": Caption("failed", error_kind="generation", error="out of memory"),
        }
        captions = [answers.get(one.key, Caption(one.key, "red", "stop")) for one in rows]
        CaptionShards(self.folder.answers / "texts", "parquet").write(0, captions)
        return read_answers(self.config("unused"), self.folder.answers, rows)

    @property
    def rejects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.rejects.read_text().splitlines()]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, processor: Any) -> Run:
    return Run(tiny_model, tmp_path, processor)


# ------------------------------------------------------------------------------------- rows too long


@pytest.mark.parametrize(
    ("positions", "max_length", "kept", "reason"),
    [
        (0, 4096, False, "{length} tokens, more than the {positions} positions of the model"),
        (1, 4096, True, ""),
        (None, 4096, True, ""),
        (1, 0, False, "{length} tokens, more than data.max_length = {max_length}"),
        (0, -1, False, "{length} tokens, more than data.max_length = {max_length}"),
        (-1, 0, False, "{length} tokens, more than the {positions} positions of the model"),
    ],
)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_a_row_longer_than_the_model_has_positions_is_rejected(
    run, positions, max_length, kept, reason, data_set
):
    """Positions and max_length are given relative to the length of the row, less one."""
    long = row("long", "What?", "red " * 50)
    files = {"train": run.file("t.json", GOOD), "validation": run.file("v.json", GOOD)}
    files[data_set] = run.file("long.json", GOOD, long)
    length = row_lengths(run.processor, run.read(run.config(files[data_set])).rows)[1].tokens
    positions = None if positions is None else length - 1 + positions
    max_length = max_length if max_length > 1 else length - 1 + max_length
    data = run.read(run.config(**files, max_length=max_length), positions)
    rows = data.rows if data_set == "train" else data.validation
    assert [one.key for one in rows] == (["good", "long"] if kept else ["good"])
    if not kept:
        (reject,) = run.rejects
        assert reject["kind"] == "too long"
        assert reject["reason"] == reason.format(length=length, positions=positions, max_length=max_length)
        assert reject["source"] == f"{run.tmp_path / 'long.json'}: row 2"
        assert reject["data_sets"] == [data_set]


def test_skipping_tokens_does_not_make_room(run, tiny_model):
    """Tokens keep their positions when others are skipped, so that the limit is that of the whole row."""
    config = run.config(run.file("t.json", GOOD))
    assert config.skip is not None
    full = config.model_copy(update={"skip": None})
    assert check_model(config).positions == check_model(full).positions == 512


# ------------------------------------------------------------------------------- rows without an answer


def test_rows_without_an_answer_need_a_teacher(run):
    assert [one.key for one in run.read(run.config(run.file("t.json", GOOD, BROKEN))).rows] == ["good"]
    (reject,) = run.rejects
    assert reject["kind"] == "conversation"
    assert "set training.objective to distill or both" in reject["reason"]


@pytest.mark.parametrize("objective", ["distill", "both"])
def test_rows_without_an_answer_are_answered_and_then_are_training_rows(run, objective):
    """Follow-up questions without an answer are still left out, and no validation row gets an answer."""
    half = row("half", "What?", "blue", "And now?")
    train = run.file("t.json", GOOD, BROKEN, half)
    data = run.read(run.config(train, run.file("v.json", GOOD, BROKEN), objective))
    answers = {one.key: one.messages[-1].text for one in data.rows}
    assert answers == {"good": "red", "half": "blue", "broken": "red"}
    assert (data.answered, len(data.lengths)) == (1, 3)
    assert [one.key for one in data.validation] == ["good"]
    assert [reject["data_sets"] for reject in run.rejects] == [["validation"]]
    same = run.read(run.config(train, train, objective))
    assert [one.key for one in same.validation] == ["good", "half"]
    unlabelled = run.file("u.json", BROKEN)
    with pytest.raises(DataError, match=r"data\.validation = .*: it has no usable row"):
        run.read(run.config(unlabelled, unlabelled, objective))


def test_questions_that_cannot_be_answered_are_rejected(run):
    keys = ("long", "empty", "placeholder", "gone", "failed")
    rows = run.read(
        run.config(run.file("t.json", *(row(key, "What?") for key in keys), BROKEN), None, "both")
    )
    assert [one.key for one in rows.rows] == ["broken"]
    assert {reject["key"]: (reject["kind"], reject["reason"]) for reject in run.rejects} == {
        "long": ("too long", "the full-token model's answer is longer than answering.max_new_tokens = 128"),
        "empty": ("conversation", "the full-token model's answer is empty"),
        "placeholder": ("placeholders", "the full-token model's answer contains <image>"),
        "gone": ("missing image", "no such file"),
        "failed": ("conversation", "the full-token model could not answer: out of memory"),
    }


def test_a_resumed_run_reads_its_answers_again(run):
    train = run.file("t.json", GOOD, BROKEN, row("long", "What?"))
    config = run.config(train, train, "distill")
    first = run.read(config)
    keep_choice(first, run.folder)
    (run.folder.checkpoints / "checkpoint_00000001").mkdir(parents=True)
    again = read_data(config, run.folder, run.processor, None)
    assert again == first
    shutil.rmtree(run.folder.answers)
    with pytest.raises(DataError, match=r"answers has no answer to row broken: restore the folder"):
        read_data(config, run.folder, run.processor, None)


# ------------------------------------------------------------------------------------- rejects.jsonl


def test_each_reject_names_its_data_set(run):
    run.read(run.config(run.file("t.json", GOOD, BROKEN), run.file("v.json", GOOD, BROKEN)))
    named = [(Path(reject["source"]).name, reject["data_sets"]) for reject in run.rejects]
    assert named == [("t.json: row 2", ["train"]), ("v.json: row 2", ["validation"])]


@pytest.mark.parametrize("validation", ["t.json", "./t.json", "*.json", "t*.json"])
def test_a_file_of_both_data_sets_is_listed_once(run, validation, monkeypatch):
    monkeypatch.chdir(run.tmp_path)
    train = run.file("t.json", GOOD, BROKEN, row("long", "What?", "red " * 100))
    data = run.read(run.config(train, validation, max_length=90))
    assert len(data.rows) == len(data.validation) == 1
    named = [(Path(reject["source"]).name, reject["data_sets"]) for reject in run.rejects]
    assert sorted(named) == [("t.json: row 2", [*DATA_SETS]), ("t.json: row 3", [*DATA_SETS])]
    assert data.rejected == {"conversation": 1, "too long": 1}


def test_late_rejects_are_listed_once_with_their_data_sets(run):
    file = run.file("t.json", GOOD, row("other", "What?", "red"))
    data = run.read(run.config(file, file))
    for rows in (data.rows, data.validation):
        LateRejects(run.folder.rejects, DATA_SETS, stop=False)(rows[1], MissingImageError("gone"))
    expected = Reject(f"{file}: row 2", "other", "missing image", "gone", DATA_SETS)
    assert [Reject(**{**line, "data_sets": tuple(line["data_sets"])}) for line in run.rejects] == [expected]


# ---------------------------------------------------------------------------------------- validation


def test_a_validation_row_is_compared_with_its_last_answer(run, tiny_model):
    train = run.file("t.json", GOOD)
    validation = run.file("v.json", row("a", "What?", "red", "Are you sure?"), row("b", "What?", "red"))
    rows = run.read(run.config(train, validation)).validation
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64)
    first, second = evaluate_exact_match(model, run.processor, rows, max_new_tokens=4)
    assert first.expected == second.expected == "red"
    assert first.answer == second.answer
