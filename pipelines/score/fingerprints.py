"""Fingerprints of a model's files, a dataset's questions and the bytes of images.

Paths are not enough to recognise these: a file may change without a new name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers.utils.hub import cached_file

from pipelines.data.images import ImageError
from pipelines.data.rows import ImageSource
from pipelines.engines.model import EngineModel
from pipelines.score.dataset import Dataset
from pipelines.score.rules.registry import RULES
from skipvision.errors import ConfigError

_LOADED_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
"""The files of a model or adapter that loading reads. The others are documentation."""


def of_folder(folder: Path) -> str:
    """Return the digest of the weights and settings of a model or an adapter; reads all of these files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _LOADED_SUFFIXES and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def of_model(path: str) -> str:
    """Return the digest of a base model's folder, or its commit on the Hugging Face hub.

    Raises:
        OSError: the model does not exist.
    """
    if Path(path).is_dir():
        return of_folder(Path(path))
    return Path(str(cached_file(path, "config.json"))).parent.name  # snapshots/COMMIT/config.json


def of_images(images: Iterable[ImageSource]) -> str:
    """Return the digest of images, in order: of their stored bytes, or of their addresses at URLs.

    A server may fail for a while, and a job must continue nevertheless. An unreadable file counts by its
    error.
    """
    digest = hashlib.sha256()
    for image in images:
        digest.update(hashlib.sha256(_content(image)).digest())
    return digest.hexdigest()


def _content(image: ImageSource) -> bytes:
    if "://" in getattr(image, "path", ""):
        return str(image).encode()
    try:
        return image.read()
    except ImageError as error:
        return error.kind.encode()


def of_dataset(dataset: Dataset) -> str:
    """Return the digest of questions, gold answers, slices, images and rule, in any order of the rows."""
    rule = next(name for name, rule in RULES.items() if rule is dataset.benchmark.rule)
    questions = sorted(
        (
            *(question.index, question.item, question.category, question.group, question.problem or ""),
            sorted((name, text) for name, text in question.row.items() if isinstance(text, str)),
            [message.text for message in question.messages],
        )
        for question in dataset.questions
    )
    by_index = sorted(dataset.questions, key=lambda question: question.index)
    images = dict.fromkeys(image for question in by_index for image in question.images)
    content = [dataset.name, rule, dataset.template, questions, of_images(images)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def of_files(datasets: Iterable[Dataset], models: Iterable[EngineModel]) -> dict[str, str]:
    """Return the digests of a job's inputs by name: ``dataset NAME`` and ``base model LABEL``.

    Raises:
        ConfigError: a base model does not exist.
    """
    files = {f"dataset {dataset.name}": of_dataset(dataset) for dataset in datasets}
    bases = {model.label: model.base for model in models}  # several systems on one base are read once
    for label, base in bases.items():
        try:
            files[f"base model {label}"] = of_model(base)
        except OSError as error:
            raise ConfigError(f"model.path = {label}: {error}") from error
    return files
