"""``python -m skipvision overlay``: a picture of what a model does with the patches of an image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from skipvision.adapters.save_load import load_adapter
from skipvision.analysis.overlay import Overlay, patches_of
from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.engine import Request
from skipvision.engine.prompts import prepare
from skipvision.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options: every field of SkipConfig is one."""
    parser.add_argument("image", type=Path, help="the picture to look at")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write, .png or another")
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter, whose SkipConfig is then used")
    parser.add_argument("--prompt", default="Describe the image.", help="what is asked about the image")
    parser.add_argument("--side", type=int, default=896, help="pixels of the picture's longer side")
    parser.add_argument("--json", action="store_true", help="print the overlay as JSON too")
    for name, field in SkipConfig.model_fields.items():
        parser.add_argument(f"--{name}", type=_value, metavar="VALUE", help=field.description)


def run(options: argparse.Namespace) -> None:
    """Draw one overlay.

    Raises:
        SkipVisionError: model, adapter, image, settings or output cannot be used.
    """
    given = {name: getattr(options, name) for name in SkipConfig.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    if options.adapter is None:
        SkipConfig(**given)  # refused before the model is loaded
    _check_output(options.output)
    image = _opened(options.image)
    overlay = _overlay(options.model, options.adapter, given, image, options.prompt)
    try:
        overlay.draw(image, options.side).save(options.output)
    except OSError as error:
        raise InputError(f"{options.output} cannot be written: {error}") from error
    if options.json:
        print(json.dumps(overlay.as_json()))
    else:
        print(f"{options.output}:", ", ".join(f"{fate} {count}" for fate, count in overlay.counts.items()))


def _overlay(
    name: str, adapter: Path | None, given: dict[str, Any], image: Image.Image, prompt: str
) -> Overlay:
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    config = model.config
    if adapter is not None:
        model = load_adapter(model, adapter)
    attachment = _attached(model, given)
    text = {"type": "text", "text": prompt}
    chat = [{"role": "user", "content": [{"type": "image"}, text]}]
    inputs = prepare(processor, Request(chat, [image])).inputs or {}
    with torch.no_grad():
        model.eval()(**inputs, use_cache=False)
    if attachment.plan is None:
        raise InputError(f"the prompt that {type(processor).__name__} made holds no image")
    [overlay] = patches_of(attachment.plan, inputs, [image.size], processor, config)
    return overlay


def _attached(model: Any, given: dict[str, Any]) -> Attachment:
    """The adapter's attachment with these fields changed, or one of these fields alone."""
    attachment = attachment_of(model)
    if attachment is None:
        return attach(model, SkipConfig(**given))
    config = SkipConfig(**{**attachment.config.model_dump(), **given})
    attachment.check(config)
    attachment.config = config
    return attachment


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # As it was held: photographs say how they are to be turned.
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no image that can be read: {error}") from error


def _check_output(path: Path) -> None:
    Image.init()
    kinds = [kind for kind, name in Image.registered_extensions().items() if name in Image.SAVE]
    if path.suffix.lower() not in kinds:
        raise InputError(f"--output {path}: {path.suffix or 'no suffix'!r} is no kind of picture; use .png")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")


def _value(text: str) -> Any:
    """1 is a count, 1.0 a fraction, true a switch; anything else is a word."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
