"""Where a job's relative paths lead.

Under ``ray job submit`` a job runs in a throw-away copy of the project: what it writes there is lost
with the copy, and which folder the copy was made of cannot be known. So relative paths are resolved
against ``$SKIPVISION_HOME`` if that is set, otherwise against the working directory; only that inside
a Ray job the latter is refused for outputs (inputs may well have travelled with the copy).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from skipvision.errors import ConfigError

HOME = "SKIPVISION_HOME"
"""Environment variable: the folder that relative paths are resolved against."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A model on the Hugging Face hub: ``owner/name``."""


def in_ray_job() -> bool:
    """Whether this process is the entry point of a ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def output_path(path: str | Path, field: str) -> Path:
    """The absolute local path something is written to; ``field`` is the setting to name in an error."""
    if "://" in str(path):
        raise ConfigError(f"{field} = {path}: give a folder that every node sees, not a URL")
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    if home := os.environ.get(HOME):
        return Path(home).expanduser().absolute() / path
    if in_ray_job():
        raise ConfigError(
            f"{field} = {path}: inside a Ray job a relative path ends in a throw-away copy of the project: "
            f"give an absolute path, or set {HOME} in the job's environment"
        )
    return path.absolute()


def output_folder(path: str | Path, field: str) -> Path:
    """`output_path` of a folder, which is made if it is not there; `ConfigError` if it cannot be one."""
    folder = output_path(path, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{field} = {path}: {error.strerror}; give a folder") from None
    return folder


def input_path(path: str, field: str) -> str:
    """The absolute path of an existing file or folder, or a pattern with ``*`` that matches; URLs pass.

    A relative path may lie in ``$SKIPVISION_HOME`` or in the working directory, in this order.
    """
    if "://" in path:
        return path
    given = Path(path).expanduser()
    bases = [Path(os.environ[HOME]).expanduser()] if os.environ.get(HOME) else []
    candidates = [base.absolute() / given for base in (*bases, Path.cwd())]
    for candidate in candidates:
        if candidate.exists() or ("*" in path and _matches(candidate)):
            return str(candidate)
    looked = " nor ".join(dict.fromkeys(map(str, candidates)))
    hint = f"; give an absolute path, or set {HOME}" if in_ray_job() and not given.is_absolute() else ""
    raise ConfigError(f"{field} = {path}: there is no {looked}{hint}")


def model_path(path: str, field: str) -> str:
    """The absolute folder of a model; or a Hugging Face id, as it is.

    What could be either, like ``models/mine``, is a path if there is a folder ``models``.
    """
    try:
        return input_path(path, field)
    except ConfigError as error:
        folder = Path(path).expanduser().parent
        bases = [Path(os.environ.get(HOME, ".")).expanduser(), Path.cwd()]
        is_path = folder != Path() and any((base / folder).is_dir() for base in bases)
        if is_path or not _HUB_ID.fullmatch(path):
            near = [found for base in bases for found in _like(base / folder, Path(path).name)]
            hint = f"; did you mean {folder / near[0]}?" if near else ""
            raise ConfigError(f"{error}{hint}") from None
    return path


def _like(folder: Path, name: str) -> list[str]:
    """What the folder holds under nearly that name."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return get_close_matches(name, names, n=1)


def _matches(pattern: Path) -> bool:
    return any(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def copy_into(folder: Path, files: Iterable[str | Path]) -> None:
    """Copies of files in a folder; those that lie there stay as they are."""
    for file in map(Path, files):
        copy = folder / file.name
        if not (copy.exists() and copy.samefile(file)):
            shutil.copy(file, copy)
