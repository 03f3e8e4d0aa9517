"""Objectives with a teacher: their losses, and that steps depend neither on batches nor on restarts."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers import modeling_utils

import skipvision as sv
from pipelines.data.collate import IGNORED
from pipelines.data.rows import Message, TrainingRow
from pipelines.engines.loading import load_frozen
from pipelines.finetune.checks import check_model
from pipelines.finetune.flops import row_flops
from skipvision.errors import ConfigError
from tests.pipelines.finetune.learners import CPU, collator_of, gradients, learner_of, teaching

TEXT = TrainingRow("text", (), (Message("user", "how many circles"), Message("assistant", "two red circles")))
"""A row without an image."""


@pytest.fixture
def batch(config, rows):
    return collator_of(config)([*rows[:3], TEXT])


@pytest.mark.parametrize(("top_k", "keeps_by_mask"), [(None, True), (4, True), (4, False)])
def test_the_loss_is_the_divergence_from_the_base_model(config, batch, monkeypatch, top_k, keeps_by_mask):
    """Of all logits of an untouched model, at the position before each learnt token."""
    if not keeps_by_mask:  # as before transformers 5.21
        monkeypatch.delattr(modeling_utils, "slice_logits_to_keep", raising=False)
    config = teaching(config, distillation={"temperature": 2.0, "top_k": top_k})
    learner = learner_of(config)
    loss = learner.loss(batch)
    base = load_frozen(config.model, torch.float32, CPU).eval()
    answers = {sv.DECODED_KEYWORD: (batch.labels != IGNORED).cumsum(dim=1) > 0}
    learnt = batch.labels[:, 1:] != IGNORED
    teacher, student = (
        logits[:, :-1][learnt]
        for logits in (
            base(**batch.inputs).logits,
            learner.model(**batch.inputs, **answers, use_cache=False).logits,
        )
    )
    targets = sv.SoftTargets.of(teacher, temperature=2.0, top_k=top_k)
    torch.testing.assert_close(loss.total, targets.divergence(student).sum())
    words = batch.labels[:, 1:][learnt]
    torch.testing.assert_close(
        loss.answers, torch.nn.functional.cross_entropy(student, words, reduction="sum")
    )
    assert loss.learnt == int(learnt.sum())
    assert loss.total > 0


def test_both_is_the_weighted_sum(config, batch):
    settings = {"answers_weight": 0.3}
    found = {
        objective: learner_of(teaching(config, objective, distillation=settings))
        for objective in ("answers", "distill", "both")
    }
    losses = {objective: learner.loss(batch) for objective, learner in found.items()}
    total = 0.3 * losses["answers"].total + 0.7 * losses["distill"].total
    torch.testing.assert_close(losses["both"].total, total)
    torch.testing.assert_close(losses["both"].answers, losses["answers"].total.detach())
    torch.testing.assert_close(losses["both"].distill, losses["distill"].total.detach())
    grads = {objective: gradients(learner, [batch]) for objective, learner in found.items()}
    torch.testing.assert_close(grads["both"], 0.3 * grads["answers"] + 0.7 * grads["distill"])


def test_an_untrained_adapter_without_skipping_has_no_divergence(config, batch):
    learner = learner_of(teaching(config, "both", skip=None))
    with torch.no_grad():
        for name, parameter in learner.trainable.items():
            if "lora_B" in name:
                parameter.zero_()
    assert learner.loss(batch).distill == 0


@pytest.mark.parametrize("objective", ["distill", "both"])
def test_gradients_do_not_depend_on_how_a_batch_is_split(config, rows, objective):
    config, rows = teaching(config, objective), [*rows[:4], TEXT]
    whole, cut = learner_of(config), learner_of(config)
    for learner, groups in ((whole, [rows]), (cut, [rows[:1], rows[1:4], rows[4:]])):
        stats = learner.step([collator_of(config)(group) for group in groups], 0, 10)
        assert stats.parts.keys() == {"answers_loss", "distill_loss"}
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(parameter, cut.trainable[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("on_policy", [0, 1])
def test_a_step_from_a_checkpoint_is_repeated_exactly(config, rows, tmp_path, on_policy):
    """Dropout takes the same random numbers, because the teacher takes none."""
    config = teaching(config, "both", dropout=0.2, distillation={"on_policy": on_policy})
    batches = [collator_of(config)(rows[i : i + 2]) for i in range(0, 8, 2)]
    straight = learner_of(config)
    for step in range(2):
        straight.step([batches[step]], step, 4)
    torch.save(straight.state(), tmp_path / "state.pt")
    stats = [straight.step([batches[step]], step, 4) for step in (2, 3)]
    torch.manual_seed(99)
    resumed = learner_of(config)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.step([batches[step]], step, 4) for step in (2, 3)] == stats
    for name, parameter in straight.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name])


def test_gradient_checkpointing_changes_nothing(config, batch):
    found = [
        gradients(learner_of(teaching(config, gradient_checkpointing=checkpointing)), [batch])
        for checkpointing in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32(config, batch):
    learners = [learner_of(teaching(config, precision=p)) for p in ("float32", "bfloat16")]
    losses = [learner.loss(batch).total.item() for learner in learners]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    grads = [gradients(learner, [batch]) for learner in learners]
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.95


def test_the_student_approaches_its_teacher(config, batch):
    learner = learner_of(teaching(config))
    before = learner.validation_losses([batch])
    parts = [learner.step([batch], step, 40).parts["distill_loss"] for step in range(40)]
    after = learner.validation_losses([batch])
    assert parts[-1] < parts[0] / 2
    assert after["validation_distill_loss"] < before["validation_distill_loss"] / 2
    assert learner.model.training


def test_the_flops_of_teacher_and_student_are_predicted(config, rows):
    learner = learner_of(teaching(config))
    for row in (rows[0], TEXT):
        flops = row_flops(learner, collator_of(config)([row]))
        assert flops["teacher"] == pytest.approx(flops["teacher_predicted"], rel=0.02)
        assert flops["student"] == pytest.approx(flops["student_predicted"], rel=0.02)
    assert all(parameter.grad is None for parameter in learner.trainable.values())


@pytest.mark.parametrize("skip", [None, sv.SkipConfig.full()], ids=["null", "full"])
def test_a_student_that_skips_nothing_is_refused(config, skip):
    with pytest.raises(ValidationError, match=r"training\.objective = distill with skip = .* nothing would"):
        teaching(config, skip=skip)
    assert teaching(config, "both", skip=skip).training.objective == "both"


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0), ("top_k", 0), ("answers_weight", 1), ("on_policy", 1.1)]
)
def test_distillation_out_of_range_is_refused(config, name, value):
    with pytest.raises(ValidationError, match=f"distillation.{name}"):
        teaching(config, distillation={name: value})


def test_top_k_above_the_vocabulary_is_refused(config):
    with pytest.raises(ConfigError, match=r"distillation\.top_k = 100000: the model has \d+ tokens"):
        check_model(teaching(config, distillation={"top_k": 100_000}))
