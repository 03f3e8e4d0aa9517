"""Write the shapes data set to disk: image files and LLaVA JSON.

::

    <output>/shapes.json                       seed and image settings
    <output>/{train,validation,test}.json      LLaVA JSON; image paths relative to <output>
    <output>/{validation,test}.tsv             VLMEvalKit's table with embedded images, if `tsv` is set
    <output>/images/<split>/000000.png …       PNG at even indices, JPEG at odd ones

A train row holds several questions of different tasks about one image (task ``mixed``). Validation and test
hold one row per image and task, so each row belongs to one task and all tasks weigh the same. Rows and pixels
are a pure function of the settings. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from pipelines.data.rows import IMAGE_PLACEHOLDER
from pipelines.shapes.scenes import (
    IMAGE_SIZE,
    SPLITS,
    TASKS,
    Question,
    Scene,
    Split,
    question_for,
    render,
    sample_scene,
)
from pipelines.shapes.table import write_table
from pipelines.shared.console import say
from pipelines.shared.paths import output_path
from skipvision.errors import ConfigError

JPEG_QUALITY = 95
"""Quality of the JPEG files. They have no chroma subsampling, so that small shapes keep their colour."""
_PROGRESS_SECONDS = 2.0


class ShapesConfig(BaseModel):
    """Settings of a shapes data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path = Field(description="folder of the data set")
    seed: int = Field(0, ge=0, description="seed of scenes and questions")
    train: int = Field(4000, ge=0, description="train images, one row each")
    validation: int = Field(50, ge=0, description="validation images, one row per task each")
    test: int = Field(200, ge=0, description="test images, one row per task each")
    turns_per_image: int = Field(
        2, ge=1, le=len(TASKS), description="questions of different tasks in one train row"
    )
    tsv: bool = Field(
        False, description="also write validation and test as tables with base64 images, for scoring"
    )


def write_shapes(config: ShapesConfig) -> dict[str, object]:
    """Write the data set. Return each split's file and its numbers of images, newly drawn images and rows.

    Raises:
        ConfigError: the folder holds images of another seed.
    """
    output = output_path(config.output, "output")
    _claim(output, config.seed)
    counts: dict[Split, int] = {split: getattr(config, split) for split in SPLITS}
    splits = {split: _write_split(config, output, split, count) for split, count in counts.items() if count}
    return {"folder": str(output), "splits": splits}


def _claim(output: Path, seed: int) -> None:
    """Record the seed in the folder. Existing images are kept, so a folder must not mix two seeds."""
    path = output / "shapes.json"
    ours = json.dumps({"seed": seed, "image_size": IMAGE_SIZE, "jpeg_quality": JPEG_QUALITY}) + "\n"
    theirs = path.read_text() if path.exists() else None
    if theirs is None:
        _write_text(path, ours)
    elif theirs != ours:
        raise ConfigError(
            f"output = {output} holds shapes drawn with {theirs.strip()}, not with {ours.strip()}: "
            "choose another output folder, or delete this one"
        )


def _write_split(config: ShapesConfig, output: Path, split: Split, count: int) -> dict[str, object]:
    (output / "images" / split).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    drawn, shown = 0, time.monotonic()
    for index in range(count):
        scene, rng = sample_scene(config.seed, split, index)
        image = f"images/{split}/{index:06d}.{'jpg' if index % 2 else 'png'}"
        drawn += _draw(scene, output / image)
        for task, questions in _conversations(split, scene, rng, config.turns_per_image):
            name = f"{split}-{index:06d}" if split == "train" else f"{split}-{index:06d}-{task}"
            rows.append({"id": name, "image": image, "task": task, "conversations": _turns(questions)})
        if time.monotonic() - shown > _PROGRESS_SECONDS or index + 1 == count:
            shown = time.monotonic()
            say(f"shapes: {split} {index + 1}/{count} images, {drawn} newly drawn")
    path = output / f"{split}.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    _write_text(path, f"[\n{lines}\n]\n")
    if config.tsv and split != "train":
        write_table(output, rows, output / f"{split}.tsv")
    return {"file": str(path), "images": count, "drawn": drawn, "rows": len(rows)}


def _conversations(
    split: Split, scene: Scene, rng: np.random.Generator, turns: int
) -> list[tuple[str, list[Question]]]:
    """Return the task and the questions of each row about a scene."""
    if split != "train":
        return [(task, [question_for(scene, task, rng)]) for task in TASKS]
    tasks = [TASKS[i] for i in rng.permutation(len(TASKS))[:turns]]
    # The caption comes last: after it, every other answer could be copied from it.
    tasks.sort(key=lambda task: task == "caption")
    return [(tasks[0] if turns == 1 else "mixed", [question_for(scene, task, rng) for task in tasks])]


def _turns(questions: list[Question]) -> list[dict[str, str]]:
    turns = []
    for position, question in enumerate(questions):
        head = f"{IMAGE_PLACEHOLDER}\n" if position == 0 else ""
        turns.append({"from": "human", "value": head + question.prompt})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def _draw(scene: Scene, path: Path) -> bool:
    """Draw the image unless its file exists, and return whether it was drawn.

    Files get their final name when they are complete.
    """
    if path.exists():
        return False
    image: Image.Image = render(scene)
    partial = _partial(path)
    if path.suffix == ".jpg":
        image.save(partial, format="JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    else:
        image.save(partial, format="PNG", compress_level=1)
    partial.replace(path)
    return True


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text)
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
