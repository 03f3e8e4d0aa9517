"""Steps in which the student writes the answers."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipelines.data.collate import IGNORED
from pipelines.data.rows import Message, TrainingRow
from pipelines.engines.loading import load_processor
from pipelines.evaluation.exact_match import evaluate_exact_match
from tests.pipelines.finetune.learners import collator_of, gradients, learner_of, teaching

TURNS = TrainingRow(
    "turns",
    (),
    (
        Message("user", "how many circles"),
        Message("assistant", "two red circles"),
        Message("user", "what is it?"),
        Message("assistant", "a blue square at the left"),
    ),
)
"""A row without an image, whose first answer stays."""


@pytest.fixture
def batch(config, rows):
    return collator_of(config)([*rows[:4], TURNS])


def own_answers(config, share=1.0, objective="distill", **options):
    return teaching(config, objective, distillation={"on_policy": share}, **options)


def sharpen(learner):
    """Make the model's distribution so peaked that sampling equals greedy decoding."""
    with torch.no_grad():
        learner.model.get_output_embeddings().weight.mul_(1e4)


def written(batch):
    return [
        ids[labels != IGNORED] for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True)
    ]


def test_the_answers_are_those_of_the_model(config, rows, batch):
    """Sampled from prompts of different lengths with and without images, they equal each row's own answer."""
    learner = learner_of(own_answers(config))
    sharpen(learner)
    with torch.no_grad():
        found = learner.on_policy.rewrite(learner.model, batch)
    processor = load_processor(config.model.path)
    right = [
        evaluate_exact_match(learner.model, processor, [row], max_new_tokens=200)[0].answer
        for row in [*rows[:4], TURNS]
    ]
    for ids, text in zip(written(found), right, strict=True):
        answer = processor.decode(ids, skip_special_tokens=True).strip()
        common = min(len(answer), len(text)) - 3  # the two have different limits, maybe inside a character
        assert common > 5
        assert answer[:common] == text[:common]
    assert learner.model.training


def test_prompts_are_kept_and_only_the_last_answer_is_learnt(config, batch):
    learner = learner_of(own_answers(config))
    found = learner.on_policy.rewrite(learner.model, batch)
    longest = max(len(own) for own in written(batch)[:4])
    for row, (before, after) in enumerate(zip(batch.labels, found.labels, strict=True)):
        learnt = (before != IGNORED).nonzero().flatten()
        breaks = (learnt.diff() > 1).nonzero().flatten()
        start = int(learnt[breaks[-1] + 1] if len(breaks) else learnt[0])
        own = (after != IGNORED).nonzero().flatten().tolist()
        assert own == list(range(start, start + len(own)))
        ids = found.inputs["input_ids"][row]
        assert torch.equal(ids[:start], batch.inputs["input_ids"][row, :start])
        assert torch.equal(ids[own], after[own])
        end = start + len(own)
        assert found.inputs["attention_mask"][row].tolist() == [1] * end + [0] * (len(ids) - end)
        *inner, last = ids[own].tolist()
        assert not set(inner) & set(learner.on_policy.ends)
        assert last in learner.on_policy.ends or len(own) <= longest
        assert not {*inner, last} & set(learner.on_policy.never)
    assert batch.labels.shape[1] >= found.labels.shape[1] - longest
    assert config.data.max_length >= found.labels.shape[1]
    assert {name: value.shape for name, value in found.inputs.items() if value.ndim > 2} == {
        name: value.shape for name, value in batch.inputs.items() if value.ndim > 2
    }


def test_an_answer_ends_at_the_longest_row_allowed(config, batch):
    width = batch.labels.shape[1]
    config = own_answers(config)
    learner = learner_of(
        config.model_copy(update={"data": config.data.model_copy(update={"max_length": width})})
    )
    assert learner.on_policy.rewrite(learner.model, batch).labels.shape[1] <= width


@pytest.mark.parametrize("objective", ["distill", "both"])
def test_the_models_own_words_are_no_target(config, batch, objective):
    """Only the teacher's predictions for them are, also with objective both."""
    learner = learner_of(own_answers(config, objective=objective))
    sharpen(learner)
    rewritten = learner.on_policy.rewrite(learner.model, batch)
    right = gradients(learner_of_sharp(teaching(config)), [rewritten])
    learner.loss(batch, None, learner.on_policy).total.backward()
    found = torch.cat([p.grad.flatten() for p in learner.trainable.values()])
    torch.testing.assert_close(found, right)
    learner.optimizer.zero_grad()
    assert learner.step([batch], 0, 10).parts.keys() == {"distill_loss"}


def learner_of_sharp(config):
    learner = learner_of(config)
    sharpen(learner)
    return learner


def test_the_steps_are_a_share_and_the_same_after_a_restart(config):
    first, second = (learner_of(own_answers(config, 0.25)).on_policy for _ in range(2))
    steps = [step for step in range(2000) if first.applies(step)]
    assert 400 < len(steps) < 600
    assert steps == [step for step in range(2000) if second.applies(step)]
    assert all(learner_of(own_answers(config)).on_policy.applies(step) for step in range(5))
    assert learner_of(own_answers(config, 0)).on_policy is None


def test_a_run_without_a_teacher_is_refused(config):
    with pytest.raises(
        ValidationError, match=r"distillation\.on_policy = 0\.5 with training\.objective = answers"
    ):
        own_answers(config, 0.5, objective="answers")
