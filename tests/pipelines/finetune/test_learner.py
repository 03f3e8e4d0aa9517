"""Training in one worker: the loss is per learnt token however a batch is split, and steps are repeatable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F

import skipvision as sv
from pipelines.data.collate import IGNORED
from pipelines.engines.loading import arithmetic
from pipelines.finetune.batches import LengthGroupedBatches
from pipelines.finetune.config import TrainingSection
from pipelines.finetune.learner import learning_rate
from skipvision.errors import ConfigError
from tests.pipelines.finetune.learners import CPU, SKIPPING, changed, collator_of, gradients, learner_of


def test_only_lora_in_the_decoder_and_the_summary_are_trained(config):
    names = list(learner_of(config).trainable)
    assert all("language_model" in name and ("lora_" in name or "skip_summary" in name) for name in names)
    assert any("skip_summary" in name for name in names)
    # Seven matrices in each of two layers, two factors each.
    assert sum("lora_" in name for name in names) == 28


def test_a_run_depends_on_its_seed_only(config):
    def run(seed: int) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        seeded = config.model_copy(update={"seed": seed})
        order = LengthGroupedBatches([3, 1, 2, 5] * 10, 4, seeded.seed)
        trainable = learner_of(seeded).trainable
        return {name: p.detach() for name, p in trainable.items()}, [order.batch(step) for step in range(10)]

    (first, batches), (same, same_batches), (other, other_batches) = run(0), run(0), run(1)
    assert batches == same_batches != other_batches
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("skip", [None, SKIPPING], ids=["full", "skipping"])
def test_the_loss_is_that_of_all_logits(config, rows, skip):
    learner = learner_of(changed(config, skip=skip, lora={"dropout": 0.0}))
    batch = collator_of(config)(rows[:4])
    loss, learnt, *_ = learner.loss(batch)
    # With skipping, answers must not be learnt from tokens that leave the cache before decoding.
    answers = {sv.DECODED_KEYWORD: (batch.labels != IGNORED).cumsum(dim=1) > 0} if skip else {}
    logits = learner.model(**batch.inputs, **answers, use_cache=False).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    assert learnt == (batch.labels != IGNORED).sum()


def test_gradients_do_not_depend_on_how_a_batch_is_split(config, rows):
    config, collate = changed(config, lora={"dropout": 0.0}), collator_of(config)
    whole, cut = learner_of(config), learner_of(config)
    for learner, groups in ((whole, [rows[:5]]), (cut, [rows[:1], rows[1:4], rows[4:5]])):
        learner.step([collate(group) for group in groups], 0, 10)
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(parameter, cut.trainable[name], rtol=1e-4, atol=1e-5)


def test_casts_left_to_autocast_change_no_value_and_save_memory(config, rows):
    training = {**config.training.model_dump(), "precision": "bfloat16"}
    model = {**config.model.model_dump(), "dtype": "bfloat16"}
    half = changed(config, model=model, training=training, lora={"dropout": 0.0})
    ours, casting = learner_of(half), learner_of(half)
    for module in casting.model.modules():
        if isinstance(module, BaseTunerLayer):
            assert not module.cast_input_dtype_enabled
            module.cast_input_dtype_enabled = True
    batch = collator_of(half)(rows[:4])
    assert torch.equal(gradients(ours, [batch]), gradients(casting, [batch]))
    for learner in (ours, casting):
        learner.step([batch], 0, 10)
    assert ours.activation_bytes < 0.95 * casting.activation_bytes


def test_a_step_from_a_checkpoint_is_repeated_exactly(config, rows, tmp_path):
    batches = [collator_of(config)(rows[i : i + 2]) for i in range(0, 12, 2)]
    straight = learner_of(config)
    for step in range(3):
        straight.step([batches[step]], step, 6)
    torch.save(straight.state(), tmp_path / "state.pt")
    losses = [straight.step([batches[step]], step, 6).loss for step in range(3, 6)]

    torch.manual_seed(99)
    resumed = learner_of(config)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [resumed.step([batches[step]], step, 6).loss for step in range(3, 6)] == losses
    for name, parameter in straight.trainable.items():
        assert torch.equal(parameter, resumed.trainable[name])


def test_training_learns(config, rows):
    learner, batch = learner_of(config), collator_of(config)(rows[:4])
    losses = [learner.step([batch], step, 40).loss for step in range(40)]
    # LoRA on random frozen weights cannot learn much, but a little.
    assert losses[-1] < losses[0] - 0.1
    assert learner.validation_losses([batch])["validation_loss"] < losses[0] - 0.1
    assert learner.model.training


def test_a_share_may_have_no_rows_or_images(config, rows):
    learner = learner_of(config)
    stats = learner.step([], 0, 10)
    assert (stats.loss, stats.learnt_tokens, stats.images) == (0.0, 0, 0)


@pytest.mark.parametrize("skip", [None, SKIPPING], ids=["full", "skipping"])
def test_gradient_checkpointing_changes_nothing(config, rows, skip):
    batch = collator_of(config)(rows[:3])
    found = []
    for checkpointing in (False, True):
        training = {**config.training.model_dump(), "gradient_checkpointing": checkpointing}
        learner = learner_of(changed(config, skip=skip, lora={"dropout": 0.0}, training=training))
        found.append(gradients(learner, [batch]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_vision_tower_keeps_no_activations(config, rows, checkpointing):
    training = {**config.training.model_dump(), "gradient_checkpointing": checkpointing}
    learner = learner_of(changed(config, skip=None, training=training))
    seen = []
    tower = learner.model.base_model.model.model.vision_tower
    tower.register_forward_hook(lambda m, a, output: seen.append(output.last_hidden_state.requires_grad))
    learner.step([collator_of(config)(rows[:2])], 0, 10)
    assert seen == [False]


def test_bfloat16_stays_near_float32(config, rows):
    batch = collator_of(config)(rows[:3])
    losses = []
    for precision in ("float32", "bfloat16"):
        training = {**config.training.model_dump(), "precision": precision}
        learner = learner_of(changed(config, skip=None, lora={"dropout": 0.0}, training=training))
        losses.append(learner.loss(batch)[0].item())
        assert all(p.dtype == torch.float32 for p in learner.trainable.values())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_default_precision_is_that_of_the_hardware():
    assert arithmetic("float32", CPU) == torch.float32
    assert arithmetic("bfloat16", CPU) == torch.bfloat16
    flags = Path("/proc/cpuinfo").read_text().split()
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert arithmetic("auto", CPU) == (torch.bfloat16 if native else torch.float32)


def test_the_learning_rate_rises_and_falls():
    training = TrainingSection(learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [learning_rate(training, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] > 0
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)
    assert learning_rate(TrainingSection(learning_rate=1.0, warmup=0), 0, 1) == 1.0


def test_wrong_settings_are_explained(config):
    with pytest.raises(ConfigError, match=r"lora.target_modules = \*\.q_proj: nothing to repeat"):
        learner_of(changed(config, lora={"target_modules": "*.q_proj"}))
    with pytest.raises(ConfigError, match=r"lora.target_modules = nothing\.like"):
        learner_of(changed(config, lora={"target_modules": "nothing.like"}))
    with pytest.raises(ConfigError, match=r"model\.path = /nowhere"):
        learner_of(changed(config, model={"path": "/nowhere"}))


def test_a_loss_that_explodes_stops_the_run(config, rows):
    learner = learner_of(config)
    with torch.no_grad():
        next(iter(learner.trainable.values())).fill_(float("nan"))
    with pytest.raises(sv.SkipVisionError, match=r"the gradient at step 8 is nan: lower"):
        learner.step([collator_of(config)(rows[:2])], 7, 10)
