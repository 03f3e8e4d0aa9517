"""Fingerprints of a model's files, of test rows, and of the bytes of images.

Paths are not enough to recognise these: a file may change without a new name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers.utils.hub import cached_file

from pipelines.data.images import FileImage, ImageError
from pipelines.data.rows import ImageSource, TrainingRow

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


def of_one(image: ImageSource) -> str:
    """Return the digest of an image's stored bytes; its name if it is a file at a URL or cannot be read."""
    if isinstance(image, FileImage) and "://" in image.path:
        return str(image)
    try:
        return hashlib.sha256(image.read()).hexdigest()
    except ImageError:
        return str(image)


def of_rows(rows: Sequence[TrainingRow]) -> str:
    """Return the digest of rows, in order: their keys, tasks, messages and images."""
    texts = [[row.key, row.task, *(message.text for message in row.messages)] for row in rows]
    images = of_images(image for row in rows for image in row.images)
    return hashlib.sha256(json.dumps([texts, images]).encode()).hexdigest()


def _content(image: ImageSource) -> bytes:
    if "://" in getattr(image, "path", ""):
        return str(image).encode()
    try:
        return image.read()
    except ImageError as error:
        return error.kind.encode()
