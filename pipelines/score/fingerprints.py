"""Fingerprints of the questions and models of a scoring job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pipelines.engines.model import EngineModel
from pipelines.evaluation.fingerprints import of_images, of_model
from pipelines.score.dataset import Dataset
from pipelines.score.rules.registry import RULES
from skipvision.errors import ConfigError


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
