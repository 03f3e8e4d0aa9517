"""Training examples of the base model: labelled patches, and packed questions about one scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from pipelines.data.collate import IGNORED
from pipelines.data.shapes_words import COLOURS, SHAPES
from pipelines.shapes.base.config import BaseModelConfig
from pipelines.shapes.base.parts import PATCH_SIZE, PATCHES_PER_SIDE
from pipelines.shapes.scenes import (
    SIZES,
    TASKS,
    Scene,
    Split,
    digit_centres,
    question_for,
    render,
    sample_scene,
)

PATCH_LABELS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "size": len(SIZES) + 1, "digit": 11}
"""The per-patch classification targets of stage 1 and their numbers of classes; class 0 is "none"."""


def patch_labels(scene: Scene) -> np.ndarray:
    """Return the (256, 4) classes of all patches, in the order of `PATCH_LABELS`."""
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
    """One question of a packed row: token ids, and the index at which the answer starts."""

    ids: list[int]
    answer_start: int


Row = dict[str, Any]
"""``pixel_values``, ``patch_labels`` and, if packed, ``branches`` of one scene."""


class SceneRows(Dataset[Row]):
    """Scenes ``start`` to ``stop - 1`` of a split as training examples of one stage.

    ``packed`` adds questions to the patch labels (stage 2). Scenes before ``easy_until`` have at most two
    objects.
    """

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

    def __getitem__(self, position: int) -> Row:
        index = self.indices[position]
        objects = (1, 2) if index < self.easy_until else (1, 4)
        scene, rng = sample_scene(self.config.seed, self.split, index, objects=objects)
        image = render(scene)
        row: Row = {
            "pixel_values": normalised(self.processor, image),
            "patch_labels": torch.from_numpy(patch_labels(scene)),
        }
        if not self.packed:
            return row
        tasks = ["caption", *(TASKS[1 + i % (len(TASKS) - 1)] for i in range(self.config.questions - 1))]
        row["branches"] = [
            encode_branch(self.processor.tokenizer, question.prompt, question.answer)
            for question in (question_for(scene, task, rng) for task in tasks)
        ]
        return row


def normalised(processor: LlavaProcessor, image: Image.Image) -> torch.Tensor:
    """Return (3, 224, 224) pixels as the image processor would, for an image that needs no resizing."""
    images = processor.image_processor
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return ((pixels - torch.tensor(images.image_mean)) / torch.tensor(images.image_std)).permute(2, 0, 1)


def encode_branch(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> Branch:
    """Return the tokens that the chat template puts after the image, for one question and its answer."""
    question = tokenizer(f"\n{prompt} ASSISTANT:", add_special_tokens=False).input_ids
    reply = tokenizer(f" {answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
    return Branch(question + reply, len(question))


@dataclass
class PackedBatch:
    """B images with their packed questions; L is the longest row, P the shared prefix with all visual tokens.

    Attributes:
        pixel_values: (B, 3, 224, 224).
        patch_labels: (B, 256, 4).
        ids: (B, L − P).
        targets: (B, L − P), IGNORED where no answer token is predicted.
        branch: (B, L) number of the question; 0 is the image, −1 padding.
        positions: (B, L); every question starts right after the image.
    """

    pixel_values: torch.Tensor
    patch_labels: torch.Tensor
    ids: torch.Tensor
    targets: torch.Tensor
    branch: torch.Tensor
    positions: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Return (B, 1, L, L) bool: causal, and limited to the image and the token's own question."""
        length = self.branch.shape[1]
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal & ((key == 0) | (key == query)))[:, None]


def collate_packed(rows: list[Row], prefix: int, pad: int) -> PackedBatch:
    """Pack each image's questions one after another, after ``prefix`` shared tokens."""
    lengths = [sum(len(branch.ids) for branch in row["branches"]) for row in rows]
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
        for number, branch in enumerate(row["branches"], start=1):
            end = at + len(branch.ids)
            ids[r, at:end] = torch.tensor(branch.ids)
            # Position i predicts token i + 1 of the same question.
            answer = torch.tensor(branch.ids[branch.answer_start :])
            targets[r, at + branch.answer_start - 1 : end - 1] = answer
            branch_of[r, prefix + at : prefix + end] = number
            positions[r, prefix + at : prefix + end] = torch.arange(prefix, prefix + len(branch.ids))
            at = end
    pixels = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.stack([row["patch_labels"] for row in rows])
    return PackedBatch(pixels, labels, ids, targets, branch_of, positions)
