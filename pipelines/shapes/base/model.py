"""Train the small base model `models/shapes-llava` from scratch on shapes.

Two stages make the training affordable on two cores:

1. *vision*: the CLIP tower alone learns to classify every patch, through a linear head: the object (shape,
   colour, size) or digit that the patch belongs to.
2. *language*: tower, projector and decoder learn to answer questions; the patch loss continues as a second
   loss, and the patch head is dropped at the end. Questions about one image share its visual tokens: they
   are packed after the image in one row, and a mask hides them from each other. One pass over 256 visual
   tokens thus serves a dozen independent questions.

Training uses only the train split. The validation split is evaluated during training, and the test split
once, for the model card.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipelines.shapes.base.card import write_card
from pipelines.shapes.base.config import BaseModelConfig
from pipelines.shapes.base.examples import PATCH_LABELS
from pipelines.shapes.base.parts import build_model, build_processor, build_tokenizer
from pipelines.shapes.base.training import train_language, train_vision
from pipelines.shared.console import say
from pipelines.shared.paths import output_path


def train_base_model(config: BaseModelConfig) -> dict[str, object]:
    """Train or resume both stages, write model, processor and card, and return the card's facts."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    work, output = output_path(config.work_dir, "work_dir"), output_path(config.output, "output")
    work.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"work_dir": work, "output": output})
    tokenizer = build_tokenizer(config.seed)
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    vision: Any = model.config.vision_config
    head = nn.Linear(vision.hidden_size, sum(PATCH_LABELS.values()))
    say(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    train_vision(config, model, head, processor)
    train_language(config, model, head, processor)
    model.eval().save_pretrained(output)
    processor.save_pretrained(output)
    return write_card(config, model, processor)
