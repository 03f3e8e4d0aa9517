"""The teacher's predictions are read from disk as it made them, by every worker, and without its forward."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipelines.finetune.checks import check_model
from pipelines.finetune.objective import Objective
from pipelines.finetune.teacher_cache import TeacherCache, bytes_per_row, claim_cache
from skipvision.errors import ConfigError
from tests.pipelines.finetune.learners import changed, collator_of, learner_of


@pytest.fixture
def cached(config):
    training = {**config.training.model_dump(), "objective": "both"}
    distillation = {"top_k": 6, "temperature": 2.0, "cache": True}
    return changed(config, lora={"dropout": 0.0}, training=training, distillation=distillation)


@pytest.fixture
def no_teacher(monkeypatch):
    """Make the teacher's forward an error from the call on."""

    def forbid():
        monkeypatch.setattr(Objective, "teacher_targets", lambda *_: pytest.fail("the teacher runs"))

    return forbid


def test_a_later_epoch_needs_no_teacher(cached, rows, tmp_path, no_teacher):
    """With the rows in other batches, on a worker that starts anew."""
    learner, collate = learner_of(cached), collator_of(cached)
    first = TeacherCache(tmp_path, 0)
    for group in (rows[:3], rows[3:4]):
        fresh, kept = learner.loss(collate(group)), learner.loss(collate(group), first)
        assert torch.equal(fresh.total, kept.total)
        assert torch.equal(learner.loss(collate(group), first).total, fresh.total)
    mixed = collate([rows[3], rows[0]])
    expected = learner.loss(mixed).total
    no_teacher()
    torch.testing.assert_close(learner.loss(mixed, TeacherCache(tmp_path, 1)).total, expected)


def test_a_row_that_is_missing_costs_a_forward(cached, rows, tmp_path, no_teacher):
    learner, collate = learner_of(cached), collator_of(cached)
    cache, other = TeacherCache(tmp_path, 0), TeacherCache(tmp_path, 1)
    learner.loss(collate(rows[:2]), cache)
    learner.loss(collate(rows[1:3]), other)  # one of them is cached, and is not written twice
    assert other.size() == cache.size()
    assert cache.size()[1] == 3
    no_teacher()
    learner.loss(collate(rows[:3]), cache)


def test_an_unfinished_line_is_ignored(cached, rows, tmp_path):
    learner, collate = learner_of(cached), collator_of(cached)
    learner.loss(collate(rows[:2]), TeacherCache(tmp_path, 0))
    (index,) = tmp_path.glob("*.jsonl")
    index.write_bytes(index.read_bytes()[:-3])
    cache = TeacherCache(tmp_path, 1)
    assert cache.get([rows[0].key], 2.0) is not None
    assert cache.get([rows[1].key], 2.0) is None


def test_validation_does_not_read_the_cache(cached, rows, tmp_path):
    learner = learner_of(cached)
    learner.cache = TeacherCache(tmp_path, 0)
    batch = collator_of(cached)(rows[:2])
    learner.validation_losses([batch])
    assert learner.cache.size() == (0, 0)
    learner.step([batch], 0, 10)
    assert learner.cache.size()[1] == 2


def test_a_cache_of_other_settings_or_rows_begins_anew(cached, rows, tmp_path):
    folder, cache = tmp_path / "teacher", TeacherCache(tmp_path / "teacher", 0)
    text = claim_cache(cached, folder, rows)
    learner_of(cached).loss(collator_of(cached)(rows), cache)
    (data,) = folder.glob("*.bin")
    estimate = bytes_per_row(cached, rows)
    assert data.stat().st_size == pytest.approx(estimate * len(rows), rel=0.02)
    assert f"about {estimate:,} bytes per row" in text
    claim_cache(cached, folder, rows)
    assert data.exists()
    claim_cache(cached, folder, rows[1:])
    assert not data.exists()
    data.touch()
    claim_cache(changed(cached, distillation={"top_k": 5, "cache": True}), folder, rows[1:])
    assert not data.exists()


def test_a_cache_needs_few_tokens(cached):
    with pytest.raises(ValidationError, match=r"distillation\.cache needs distillation\.top_k"):
        changed(cached, distillation={"cache": True})
    vocabulary = 10**6
    with pytest.raises(
        ConfigError, match=r"distillation\.top_k = 1000000: the model has \d+ tokens; set fewer$"
    ):
        check_model(changed(cached, distillation={"cache": True, "top_k": vocabulary}))
