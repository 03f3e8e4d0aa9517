"""Digests of what answers depend on: a model's files, a dataset's questions, the bytes of images.

Names and paths do not tell: a file may be replaced by another under the same one.
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
from pipelines.score.benchmarks import RULES
from pipelines.score.dataset import Dataset
from skipvision.errors import ConfigError

_LOADED = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
"""Suffixes of a model's and an adapter's files that loading reads; the others are prose."""


def of_folder(folder: Path) -> str:
    """The weights and settings of a model or an adapter in a folder; reads all of them."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _LOADED and not file.name.startswith("."):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def of_model(path: str) -> str:
    """A base model: its files in a folder, or its commit on the Hugging Face hub.

    Raises:
        OSError: there is no such model.
    """
    if Path(path).is_dir():
        return of_folder(Path(path))
    return Path(str(cached_file(path, "config.json"))).parent.name  # of the snapshot: the commit


def of_images(images: Iterable[ImageSource]) -> str:
    """The images' bytes as they are stored, in their order; what cannot be read, by its kind of error."""
    digest = hashlib.sha256()
    for image in images:
        try:
            content = image.read()
        except ImageError as error:
            content = error.kind.encode()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def of_dataset(dataset: Dataset) -> str:
    """Questions, gold answers, slices, images, and the rule that gives points; in any order of the rows."""
    rule = next(name for name, rule in RULES.items() if rule is dataset.benchmark.rule)
    asked = sorted(
        (
            *(question.index, question.item, question.category, question.group, question.problem or ""),
            sorted((name, text) for name, text in question.row.items() if isinstance(text, str)),
            [message.text for message in question.messages],
        )
        for question in dataset.questions
    )
    by_index = sorted(dataset.questions, key=lambda question: question.index)
    images = dict.fromkeys(image for question in by_index for image in question.images)
    told = [dataset.name, rule, dataset.template, asked, of_images(images)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def of_files(datasets: Iterable[Dataset], models: Iterable[EngineModel]) -> dict[str, str]:
    """What a job's answers depend on: ``dataset NAME`` and ``base model LABEL``, each with its digest.

    Raises:
        ConfigError: there is no such base model.
    """
    files = {f"dataset {dataset.name}": of_dataset(dataset) for dataset in datasets}
    bases = {model.label: model.base for model in models}  # several systems on one base are read once
    for label, base in bases.items():
        try:
            files[f"base model {label}"] = of_model(base)
        except OSError as error:
            raise ConfigError(f"model.path = {label}: {error}") from error
    return files
