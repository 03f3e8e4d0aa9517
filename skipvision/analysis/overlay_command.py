"""``python -m skipvision overlay``: draw which patches of an image a model retains, skips and merges."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml
from PIL import Image

from skipvision.adapters.save_load import load_adapter
from skipvision.analysis.overlay import Overlay, patches_of
from skipvision.attach import Attachment, attach, attachment_of
from skipvision.config import SkipConfig
from skipvision.engine import Request
from skipvision.engine.prompts import prepare
from skipvision.errors import ConfigError, InputError
from skipvision.loading import load_model, load_processor
from skipvision.orientation import upright
from skipvision.problems import Field, fields_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: its own, and one for each field of SkipConfig.

    Raises:
        ConfigError: a module with further methods cannot be imported.
    """
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="image file to create, .png or another format"
    )
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; its SkipConfig is used")
    parser.add_argument("--prompt", default="Describe the image.", help="question about the image")
    parser.add_argument("--side", type=int, default=896, help="longer side of the drawing, in pixels")
    parser.add_argument("--json", action="store_true", help="print the overlay as JSON")
    for field in fields_of(SkipConfig):
        parser.add_argument(f"--{field.name}", type=_value, metavar="VALUE", help=_help(field))


def _help(field: Field) -> str:
    """Return a field's description with its choices, if it takes names."""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    text = f"{field.description}: {', '.join(choices)}" if choices else field.description
    return text.replace("%", "%%")


def run(options: argparse.Namespace) -> None:
    """Draw one overlay.

    Raises:
        SkipVisionError: model, adapter, image, settings or output cannot be used.
    """
    given = {name: getattr(options, name) for name in SkipConfig.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    if options.adapter is None:
        SkipConfig(**given)  # report errors before loading the model
    _check_output(options.output)
    image = _open(options.image)
    overlay = _overlay(options.model, options.adapter, given, image, options.prompt)
    try:
        overlay.draw(image, options.side).save(options.output)
    except OSError as error:
        raise InputError(f"{options.output} cannot be written: {error}") from error
    if options.json:
        print(json.dumps(overlay.as_json()))
    else:
        after = "" if overlay.drop_after is None else f"; none after layer {overlay.drop_after}"
        print(f"{options.output}:", ", ".join(f"{fate} {n}" for fate, n in overlay.counts.items()) + after)


def _overlay(
    name: str, adapter: Path | None, given: dict[str, Any], image: Image.Image, prompt: str
) -> Overlay:
    try:
        model: Any = load_model(name)
        processor = load_processor(name)
    except ConfigError as error:
        raise InputError(f"--model cannot be loaded: {str(error).splitlines()[0]}") from error
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
        raise InputError(f"the prompt that {type(processor).__name__} produced has no image")
    [overlay] = patches_of(attachment.plan, inputs, [image.size], processor, config)
    return overlay


def _attached(model: Any, given: dict[str, Any]) -> Attachment:
    """Return the adapter's attachment with these fields changed, or a new one with these fields."""
    attachment = attachment_of(model)
    if attachment is None:
        return attach(model, SkipConfig(**given))
    config = SkipConfig(**{**attachment.config.model_dump(), **given})
    attachment.check(config)
    attachment.config = config
    return attachment


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return upright(image).convert("RGB")
    except Exception as error:  # decoders raise errors of many types on damaged files
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _check_output(path: Path) -> None:
    Image.init()
    kinds = [kind for kind, name in Image.registered_extensions().items() if name in Image.SAVE]
    if path.suffix.lower() not in kinds:
        raise InputError(f"--output {path}: {path.suffix or 'no suffix'!r} is not an image format: use .png")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: the folder {path.parent} does not exist")


def _value(text: str) -> Any:
    """Parse a value: 1 is a count, 1.0 a fraction, true a boolean, anything else text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
