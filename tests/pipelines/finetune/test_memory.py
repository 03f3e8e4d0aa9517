"""Memory of training steps: the largest batch is measured, and the first one predicted."""

from __future__ import annotations

import pytest

from pipelines.finetune.memory import Memory, predicted_activations
from tests.pipelines.finetune.learners import SKIPPING, changed, collator_of, learner_of


@pytest.mark.parametrize("skip", [None, SKIPPING], ids=["full", "skipping"])
def test_the_prediction_is_near_the_measured_bytes(config, rows, skip):
    learner = learner_of(changed(config, skip=skip, lora={"dropout": 0.0}))
    batch = collator_of(config)(rows[:4])
    predicted = predicted_activations(learner, batch)
    learner.step([batch], 0, 10)
    # In a tiny model the masks of rows with padding, which are not predicted, are not negligible.
    assert predicted == pytest.approx(learner.activation_bytes, rel=0.2)


def test_the_largest_batch_counts(config, rows):
    learner, collate = learner_of(config), collator_of(config)
    small, large = collate(rows[:1]), collate(rows[:4])
    learner.step([small], 0, 10)
    first = learner.activation_bytes
    learner.step([large, small], 1, 10)
    assert learner.activation_bytes > 2 * first
    largest = learner.activation_bytes
    learner.step([small], 2, 10)
    assert learner.activation_bytes == largest


def test_memory_that_checkpoints_save_is_measured_but_not_predicted(config, rows):
    training = {**config.training.model_dump(), "gradient_checkpointing": True}
    learner, plain = learner_of(changed(config, training=training)), learner_of(config)
    batch = collator_of(config)(rows[:4])
    memory = Memory(learner, None)
    memory.predict([batch])
    for each in (learner, plain):
        each.step([batch], 0, 10)
    assert 0 < learner.activation_bytes < plain.activation_bytes / 2
    assert memory.result(1) == {"activation_bytes": learner.activation_bytes}


def test_a_session_without_a_step_reports_nothing(config):
    assert Memory(learner_of(config), None).result(10) == {}
