"""The two training stages of the base model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pipelines.data.collate import IGNORED
from pipelines.shapes.base.config import BaseModelConfig
from pipelines.shapes.base.examples import PATCH_LABELS, PackedBatch, Row, SceneRows, collate_packed
from pipelines.shapes.base.parts import PATCHES_PER_SIDE
from pipelines.shapes.scenes import TASKS, Split
from pipelines.shared.console import say
from pipelines.shared.files import atomic


class Stage:
    """Optimiser, schedule, checkpoint and log of one training stage, resumable at any step."""

    def __init__(
        self,
        config: BaseModelConfig,
        name: str,
        parameters: list[tuple[list[nn.Parameter], float]],
        modules: dict[str, nn.Module],
        steps: int,
    ) -> None:
        self.config, self.name, self.steps, self.modules = config, name, steps, modules
        groups = [
            {"params": [p for p in params if (p.ndim > 1) == decayed], "lr": rate, "weight_decay": decay}
            for params, rate in parameters
            for decayed, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), fused=True)
        warm = max(1, int(steps * config.warmup))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))),
        )
        self.path = config.work_dir / f"{name}.pt"
        self.log_path = config.work_dir / f"{name}.jsonl"
        self.step, self.seconds = 0, 0.0
        self._resume()
        self._mark = self._saved = time.monotonic()

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds = state["step"], state["seconds"]
        say(f"{self.name}: resumed at step {self.step}/{self.steps}")

    def save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with atomic(self.path) as partial, partial.open("wb") as file:  # torch hides the cause for a path
            torch.save(state, file)

    def update(self, loss: torch.Tensor, **measured: object) -> None:
        """Run one optimiser step. Log every 50th step; save a checkpoint every few minutes and at the end."""
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        now = time.monotonic()
        self.seconds += now - self._mark
        self._mark = now
        if self.step % 50 == 0 or self.step == self.steps:
            entry = {
                "step": self.step,
                "seconds": round(self.seconds, 1),
                "loss": round(loss.item(), 4),
                **measured,
            }
            with self.log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            left = self.seconds / self.step * (self.steps - self.step)
            say(f"{self.name} {self.step}/{self.steps} {entry} {left / 60:.0f} min left")
        if now - self._saved > self.config.checkpoint_minutes * 60 or self.step == self.steps:
            self.save()
            self._saved = now


def _loader(
    rows: SceneRows, batch: int, collate: Callable[[list[Row]], Any] | None = None
) -> DataLoader[Row]:
    return DataLoader(
        rows,
        batch_size=batch,
        num_workers=rows.config.workers,
        collate_fn=collate,
        prefetch_factor=6 if rows.config.workers else None,
        worker_init_fn=_single_thread,
    )


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)


def patch_loss(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """Return the loss of the patch head's (B, 256, classes) scores, and accuracies on patches of objects."""
    losses, right = [], {}
    columns = scores.float().split(list(PATCH_LABELS.values()), dim=-1)
    for name, column, target in zip(PATCH_LABELS, columns, labels.unbind(-1), strict=True):
        losses.append(F.cross_entropy(column.flatten(0, 1), target.flatten()))
        labelled = target > 0
        right[f"{name}_accuracy"] = round((column.argmax(-1) == target)[labelled].float().mean().item(), 3)
    # Digits cover two or three patches of 256: without a weight, the mean would hide their loss.
    *rest, digits = losses
    return sum(rest, start=digits * 4), right


def train_vision(
    config: BaseModelConfig, model: LlavaForConditionalGeneration, head: nn.Module, processor: LlavaProcessor
) -> None:
    """Run stage 1: the vision tower learns to classify every patch."""
    tower = model.model.vision_tower
    parameters = [([*tower.parameters(), *head.parameters()], config.vision_learning_rate)]
    steps = config.vision_images // config.vision_batch
    stage = Stage(config, "vision", parameters, {"tower": tower, "head": head}, steps)
    rows = SceneRows(
        config, processor, "train", stage.step * config.vision_batch, config.vision_images, packed=False
    )
    for batch in _loader(rows, config.vision_batch) if stage.step < steps else ():
        with torch.autocast("cpu", torch.bfloat16):
            scores = head(visual_features(model, batch["pixel_values"]))
        loss, measured = patch_loss(scores, batch["patch_labels"])
        stage.update(loss, **measured)
        if stage.step == steps:
            break


def train_language(
    config: BaseModelConfig, model: LlavaForConditionalGeneration, head: nn.Module, processor: LlavaProcessor
) -> None:
    """Run stage 2: tower, projector and decoder learn to answer packed questions."""
    tower = [*model.model.vision_tower.parameters(), *head.parameters()]
    rest = [p for name, p in model.named_parameters() if ".vision_tower." not in name]
    steps = config.language_images // config.language_batch
    parameters = [(tower, config.tower_learning_rate), (rest, config.language_learning_rate)]
    stage = Stage(config, "language", parameters, {"model": model, "head": head}, steps)
    first = config.vision_images  # stage 1 used the scenes before
    prefix_ids = torch.tensor(processor.tokenizer("USER: ", add_special_tokens=False).input_ids)
    prefix, pad = len(prefix_ids) + PATCHES_PER_SIDE**2, processor.tokenizer.pad_token_id

    digits = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))

    def rows(split: Split, start: int, stop: int) -> DataLoader[Any]:
        easy_until = first + int(config.language_images * config.easy_share)
        scenes = SceneRows(
            config,
            processor,
            split,
            start,
            stop,
            packed=True,
            easy_until=easy_until if split == "train" else 0,
        )
        return _loader(scenes, config.language_batch, lambda rows: collate_packed(rows, prefix, pad))

    validation = list(rows("validation", 0, 96)) if stage.step < steps else []
    start = first + stage.step * config.language_batch
    for batch in rows("train", start, first + config.language_images) if stage.step < steps else ():
        with torch.autocast("cpu", torch.bfloat16):
            features = visual_features(model, batch.pixel_values)
            logits, targets = packed_logits(model, batch, features, prefix_ids)
            scores = head(features)
        patches, measured = patch_loss(scores, batch.patch_labels)
        if (stage.step + 1) % 200 == 0 or stage.step + 1 == steps:
            measured["validation"] = forced_accuracy(config, model, validation, prefix_ids)
        # A digit is one patch of 256. Without a weight, easier tasks dominate and reading is never learnt.
        boost = config.digit_weight if stage.step >= config.digits_from else 1.0
        weights = torch.where(torch.isin(targets, digits), boost, 1.0)
        answers = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        stage.update(
            answers + config.patch_loss_weight * patches, answer_loss=round(answers.item(), 4), **measured
        )
        if stage.step == steps:
            break


@torch.no_grad()
def forced_accuracy(
    config: BaseModelConfig,
    model: LlavaForConditionalGeneration,
    batches: list[PackedBatch],
    prefix_ids: torch.Tensor,
) -> dict[str, float]:
    """Return the share of answers per task whose tokens are all the most likely, as in greedy decoding."""
    model.eval()
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            features = visual_features(model, batch.pixel_values)
            logits, targets = packed_logits(model, batch, features, prefix_ids)
        correct = torch.ones_like(batch.targets, dtype=torch.bool)
        correct[batch.targets != IGNORED] = logits.argmax(-1) == targets
        branch = batch.branch[:, -batch.ids.shape[1] :]
        for number in range(1, config.questions + 1):
            task = TASKS[0] if number == 1 else TASKS[1 + (number - 2) % (len(TASKS) - 1)]
            right[task] += (correct | (branch != number)).all(dim=1).tolist()
    model.train()
    return {task: round(float(np.mean(hits)), 3) for task, hits in right.items()}


def visual_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the (B, 256, vision hidden) features that LLaVA projects, without CLIP's class token."""
    hidden: torch.Tensor = model.model.vision_tower(pixel_values).last_hidden_state
    return hidden[:, 1:]


def packed_logits(
    model: LlavaForConditionalGeneration, batch: PackedBatch, features: torch.Tensor, prefix_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (S, V) and targets (S,) of the S supervised positions of a packed batch."""
    count = len(batch.ids)
    embed = model.get_input_embeddings()
    visual = model.model.multi_modal_projector(features)
    words = embed(torch.cat([prefix_ids.expand(count, -1), batch.ids], dim=1))
    head = len(prefix_ids)
    embeds = torch.cat([words[:, :head], visual.to(words.dtype), words[:, head:]], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    hidden = hidden[:, head + visual.shape[1] :]
    supervised = batch.targets != IGNORED
    return model.lm_head(hidden[supervised]).float(), batch.targets[supervised]
