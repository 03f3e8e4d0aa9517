"""The small base model, trained from scratch on shapes: `models/shapes-llava/`.

Two stages make it affordable on two cores:

1. *vision*: the CLIP tower alone learns, from a linear head on every patch, which object (shape,
   colour, size) or digit the patch belongs to.
2. *language*: tower, projector and decoder together answer questions, and the patch loss goes on
   beside it; the patch head is thrown away at the end. Questions about one image
   share its visual tokens: they are packed behind the image in one row and a mask keeps each from
   seeing the others, so one pass over 256 visual tokens pays for a dozen independent questions.

Everything is drawn from the train split; the validation split is watched, the test split is only
ever read by the evaluation at the end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipelines.shapes import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    TASKS,
    Scene,
    Split,
    ask,
    digit_centres,
    render,
    sample_scene,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "ASSISTANT:{% generation %} {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} "
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PATCH_SIZE = 14
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
IGNORED = -100


class BaseModelConfig(BaseModel):
    """Everything that decides what `models/shapes-llava` becomes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path = Field(Path("models/shapes-llava"), description="folder the finished model is written to")
    work_dir: Path = Field(Path("runs/base"), description="folder for checkpoints and the training log")
    seed: int = Field(0, description="seed of the weights, the scenes and the questions")
    vision_images: int = Field(51_200, description="stage 1: images seen")
    vision_batch: int = Field(32, description="stage 1: images per step")
    vision_learning_rate: float = Field(1.5e-3, description="stage 1: peak AdamW learning rate")
    language_images: int = Field(48_000, description="stage 2: images seen, each with `questions` questions")
    language_batch: int = Field(16, description="stage 2: images per step")
    language_learning_rate: float = Field(
        1.2e-3, description="stage 2: peak AdamW learning rate of the decoder"
    )
    tower_learning_rate: float = Field(
        6e-4, description="stage 2: peak AdamW learning rate of the vision tower"
    )
    patch_loss_weight: float = Field(0.3, description="stage 2: weight of stage 1's loss, which goes on")
    questions: int = Field(
        12, description="stage 2: independent questions per image, one of them the caption"
    )
    warmup: float = Field(0.03, description="share of a stage's steps spent warming up")
    easy_share: float = Field(0.1, description="stage 2: share of the steps that show at most two objects")
    digit_weight: float = Field(6.0, description="stage 2: loss weight of digits from `digits_from` on")
    digits_from: int = Field(1080, description="stage 2: step from which `digit_weight` holds")
    weight_decay: float = Field(0.02, description="AdamW weight decay of matrices")
    workers: int = Field(1, description="processes that draw scenes")
    threads: int = Field(0, description="torch threads; 0 = torch's own choice")
    checkpoint_minutes: float = Field(5.0, description="minutes between checkpoints")
    evaluation_scenes: int = Field(600, description="test scenes per task in the model card's accuracy")


# ------------------------------------------------------------------------------- model and processor


def build_tokenizer(seed: int, vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from questions and answers; any text can be written in it."""

    def corpus() -> Iterator[str]:
        for index in range(3000):
            scene, rng = sample_scene(seed, "train", index)
            for task in TASKS:
                question = ask(scene, task, rng)
                yield f"USER: \n{question.prompt} ASSISTANT: {question.answer}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=2048,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """LLaVA's processor for `IMAGE_SIZE` images, chat template included."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """LLaVA in small: 256 visual tokens; FFN and attention weigh in a layer as they do in Llama-3-8B."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES_PER_SIDE**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def visual_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 256, vision hidden): the features LLaVA projects, without CLIP's class token."""
    hidden: torch.Tensor = model.model.vision_tower(pixel_values).last_hidden_state
    return hidden[:, 1:]


# --------------------------------------------------------------------------------------- the examples

PATCH_LABELS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1, "digit": 11}
"""Stage 1's per-patch classification targets and their class counts; class 0 is "none"."""


def patch_labels(scene: Scene) -> np.ndarray:
    """(256, 4) class of every patch in the order of `PATCH_LABELS`."""
    labels = np.zeros((PATCHES_PER_SIDE, PATCHES_PER_SIDE, len(PATCH_LABELS)), dtype=np.int64)
    middle = (np.arange(PATCHES_PER_SIDE) + 0.5) * PATCH_SIZE
    for thing in scene.things:
        dx, dy = middle[None, :] - thing.centre[0], middle[:, None] - thing.centre[1]
        inside = np.hypot(dx, dy) < thing.radius + PATCH_SIZE / 3
        labels[inside, 0] = SHAPES.index(thing.shape) + 1
        labels[inside, 1] = list(COLOURS).index(thing.colour) + 1
        labels[inside, 2] = list(SIZES).index(thing.size) + 1
    for digit, x, y in digit_centres(scene):
        labels[int(y // PATCH_SIZE), int(x // PATCH_SIZE), 3] = int(digit) + 1
    return labels.reshape(-1, len(PATCH_LABELS))


@dataclass(frozen=True)
class Branch:
    """One question of a packed row: its token ids and which of them are the answer."""

    ids: list[int]
    answer_start: int


class SceneRows(Dataset):
    """Scenes ``start … stop`` of a split as training examples of one stage."""

    def __init__(
        self,
        config: BaseModelConfig,
        processor: LlavaProcessor,
        split: Split,
        start: int,
        stop: int,
        *,
        packed: bool,
        easy_until: int = 0,
    ) -> None:
        self.config, self.processor, self.split = config, processor, split
        self.indices = range(start, stop)
        self.packed, self.easy_until = packed, easy_until

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, object]:
        index = self.indices[position]
        objects = (1, 2) if index < self.easy_until else (1, 4)
        scene, rng = sample_scene(self.config.seed, self.split, index, objects=objects)
        image = render(scene)
        row: dict[str, object] = {
            "pixel_values": normalised(self.processor, image),
            "patch_labels": torch.from_numpy(patch_labels(scene)),
        }
        if not self.packed:
            return row
        tasks = ["caption", *(TASKS[1 + i % (len(TASKS) - 1)] for i in range(self.config.questions - 1))]
        row["branches"] = [
            encode_branch(self.processor.tokenizer, question.prompt, question.answer)
            for question in (ask(scene, task, rng) for task in tasks)
        ]
        return row


def normalised(processor: LlavaProcessor, image: Image.Image) -> torch.Tensor:
    """(3, 224, 224): what the image processor makes of an image that has the right size already."""
    images = processor.image_processor
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)).permute(2, 0, 1)


def encode_branch(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> Branch:
    """The chat template's tokens behind the image for one question and its answer."""
    question = tokenizer(f"\n{prompt} ASSISTANT:", add_special_tokens=False).input_ids
    reply = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
    return Branch(question + reply, len(question))


@dataclass
class PackedBatch:
    """B images with their packed questions; L is the longest row, P the tokens up to the last visual one.

    ``patch_labels`` (B, 256, 4); ``ids`` (B, L − P); ``targets`` (B, L − P), IGNORED where nothing is asked; ``branch`` (B, L), 0 for
    the image, −1 for padding; ``positions`` (B, L): every question starts right behind the image.
    """

    pixel_values: torch.Tensor
    patch_labels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    branch: torch.Tensor
    positions: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """(B, 1, L, L) bool: causal, own question and the image only."""
        length = self.branch.shape[1]
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal & ((key == 0) | (key == query)))[:, None]


def collate_packed(rows: list[dict[str, object]], prefix: int, pad: int) -> PackedBatch:
    """Lay each image's questions one after another behind ``prefix`` shared tokens."""
    lengths = [sum(len(branch.ids) for branch in row["branches"]) for row in rows]  # type: ignore[attr-defined]
    longest = -(-(prefix + max(lengths)) // 32) * 32 - prefix
    count = len(rows)
    ids = torch.full((count, longest), pad)
    targets = torch.full((count, longest), IGNORED)
    branch_of = torch.full((count, prefix + longest), -1)
    positions = torch.zeros(count, prefix + longest, dtype=torch.long)
    branch_of[:, :prefix] = 0
    positions[:, :prefix] = torch.arange(prefix)
    for r, row in enumerate(rows):
        at = 0
        for number, branch in enumerate(row["branches"], start=1):  # type: ignore[arg-type]
            end = at + len(branch.ids)
            ids[r, at:end] = torch.tensor(branch.ids)
            # Position i predicts token i + 1 of its own question.
            answer = torch.tensor(branch.ids[branch.answer_start :])
            targets[r, at + branch.answer_start - 1 : end - 1] = answer
            branch_of[r, prefix + at : prefix + end] = number
            positions[r, prefix + at : prefix + end] = torch.arange(prefix, prefix + len(branch.ids))
            at = end
    pixels = torch.stack([row["pixel_values"] for row in rows])  # type: ignore[misc]
    labels = torch.stack([row["patch_labels"] for row in rows])  # type: ignore[misc]
    return PackedBatch(pixels, labels, ids, targets, branch_of, positions)


def packed_logits(
    model: LlavaForConditionalGeneration, batch: PackedBatch, features: torch.Tensor, prefix_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (S, V) and targets (S,) of the S supervised positions of a packed batch."""
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


# ------------------------------------------------------------------------------------------- training


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
        print(f"{self.name}: resumed at step {self.step}/{self.steps}", flush=True)

    def save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def update(self, loss: torch.Tensor, **measured: object) -> None:
        """One optimiser step; logs every 50th, checkpoints by the clock and at the end."""
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
            print(f"{self.name} {self.step}/{self.steps} {entry} {left / 60:.0f} min left", flush=True)
        if now - self._saved > self.config.checkpoint_minutes * 60 or self.step == self.steps:
            self.save()
            self._saved = now


def _loader(rows: SceneRows, batch: int, collate: object = None) -> DataLoader:
    return DataLoader(
        rows,
        batch_size=batch,
        num_workers=rows.config.workers,
        collate_fn=collate,  # type: ignore[arg-type]
        prefetch_factor=6 if rows.config.workers else None,
        worker_init_fn=_single_thread,
    )


def _single_thread(_: int) -> None:
    torch.set_num_threads(1)


def patch_loss(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """Cross-entropy of the patch head's (B, 256, classes) scores, and the accuracy on patches that show something."""
    losses, right = [], {}
    columns = scores.float().split(list(PATCH_LABELS.values()), dim=-1)
    for name, column, target in zip(PATCH_LABELS, columns, labels.unbind(-1), strict=True):
        losses.append(F.cross_entropy(column.flatten(0, 1), target.flatten()))
        there = target > 0
        right[f"{name}_accuracy"] = round((column.argmax(-1) == target)[there].float().mean().item(), 3)
    # Digits cover two or three patches of 256: their share of the mean would be lost otherwise.
    *rest, digits = losses
    return sum(rest, start=digits * 4), right


def train_vision(
    config: BaseModelConfig, model: LlavaForConditionalGeneration, head: nn.Module, processor: LlavaProcessor
) -> None:
    """Stage 1: the vision tower learns to say of every patch what it belongs to."""
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
    """Stage 2: tower, projector and decoder answer packed questions."""
    tower = [*model.model.vision_tower.parameters(), *head.parameters()]
    rest = [p for name, p in model.named_parameters() if ".vision_tower." not in name]
    steps = config.language_images // config.language_batch
    parameters = [(tower, config.tower_learning_rate), (rest, config.language_learning_rate)]
    stage = Stage(config, "language", parameters, {"model": model, "head": head}, steps)
    first = config.vision_images  # scenes that stage 1 has not shown
    prefix_ids = torch.tensor(processor.tokenizer("USER: ", add_special_tokens=False).input_ids)
    prefix, pad = len(prefix_ids) + PATCHES_PER_SIDE**2, processor.tokenizer.pad_token_id

    digits = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list("0123456789")))

    def rows(split: Split, start: int, stop: int) -> DataLoader:
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
        # A digit is one patch of 256: reading it is learnt last, and not at all beside what is easier.
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
    """Share of answers per task whose every token is the most likely one (what greedy decoding would say)."""
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


def train_base_model(config: BaseModelConfig) -> Path:
    """Train (or resume) both stages and write the model and its processor; returns the folder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config.seed)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    head = nn.Linear(model.config.vision_config.hidden_size, sum(PATCH_LABELS.values()))
    train_vision(config, model, head, processor)
    train_language(config, model, head, processor)
    model.eval().save_pretrained(config.output)
    processor.save_pretrained(config.output)
    return config.output
