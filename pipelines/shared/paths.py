"""Resolve a job's relative paths.

Under ``ray job submit`` a job runs in a temporary copy of the project: output written there is lost, and
the original folder is unknown. Relative paths therefore start at ``$SKIPVISION_HOME`` if it is set, and
otherwise at the working directory. Inside a Ray job the working directory serves inputs only, because inputs
may be part of the copy.

A setting that is a path has one of the types `InputPath`, `ModelPath`, `AdapterPath`, `OutputPath` and
`OutputFolder`. `resolve_paths` makes all of them absolute at once.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel

from pipelines._compat import RAY_JOB_VARIABLE
from skipvision.errors import ConfigError, Problems
from skipvision.loading import HUB_ID

M = TypeVar("M", bound=BaseModel)

HOME = "SKIPVISION_HOME"
"""Environment variable: the folder that relative paths start at."""

_DEMO_DATA = ("data", "shapes")
"""The folder of the demo's data set."""

_IN_MLFLOW = ("models:/", "runs:/")


def in_ray_job() -> bool:
    """Return whether this process is the entry point of a ``ray job submit``."""
    return RAY_JOB_VARIABLE in os.environ


# ------------------------------------------------------------------------------------------- one path


def output_path(path: str | Path, field: str) -> Path:
    """Return the absolute local path of an output.

    Args:
        path: the setting's value.
        field: the setting's name, for errors.

    Raises:
        ConfigError: ``path`` is a URL, or is relative in a Ray job without ``$SKIPVISION_HOME``.
    """
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
    """Return the `output_path` of a folder and create it.

    Raises:
        ConfigError: also if the folder cannot be created.
    """
    folder = output_path(path, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{field} = {path}: {error.strerror}; give a folder") from None
    return folder


def input_path(path: str, field: str) -> str:
    """Return the absolute path of an existing file or folder, or of a pattern with ``*`` that matches one.

    A relative path is searched for in ``$SKIPVISION_HOME`` and then in the working directory. URLs are
    returned unchanged.

    Raises:
        ConfigError: nothing exists there.
    """
    if "://" in path:
        return path
    given = Path(path).expanduser()
    bases = [Path(os.environ[HOME]).expanduser()] if os.environ.get(HOME) else []
    candidates = [base.absolute() / given for base in (*bases, Path.cwd())]
    for candidate in candidates:
        candidate = Path(equivalent_path(str(candidate)))
        try:
            if candidate.exists() or ("*" in path and _matches(candidate)):
                return str(candidate)
        except OSError as error:
            raise ConfigError(
                f"{field} = {path}: {candidate} cannot be accessed: {error.strerror}; make it, and the "
                "folders that it is in, readable"
            ) from None
    searched = " nor ".join(dict.fromkeys(map(str, candidates)))
    hint = f"; give an absolute path, or set {HOME}" if in_ray_job() and not given.is_absolute() else ""
    if given.parts[:2] == _DEMO_DATA:
        hint += "; run `make demo` or jobs/make_shapes.py first, which draw these files"
    raise ConfigError(f"{field} = {path}: there is no {searched}{hint}")


def model_path(path: str, field: str) -> str:
    """Return the absolute folder of a model, or a Hugging Face id unchanged.

    ``models/mine`` could be either: it is a path if a folder ``models`` exists.

    Raises:
        ConfigError: the folder does not exist.
    """
    try:
        return input_path(path, field)
    except ConfigError as error:
        folder = Path(path).expanduser().parent
        bases = [Path(os.environ.get(HOME, ".")).expanduser(), Path.cwd()]
        is_path = folder != Path() and any(os.path.isdir(base / folder) for base in bases)  # noqa: PTH112
        if is_path or not HUB_ID.fullmatch(path):
            near = [match for base in bases for match in _similar_names(base / folder, Path(path).name)]
            hint = f"; did you mean {folder / near[0]}?" if near else ""
            raise ConfigError(f"{error}{hint}") from None
    return path


def artifact_path(path: str, field: str) -> str:
    """Return `input_path`, or ``models:/…`` and ``runs:/…``, which name something in MLflow, unchanged."""
    return path if path.startswith(_IN_MLFLOW) else input_path(path, field)


def equivalent_path(path: str) -> str:
    """Return the existing local path that differs from ``path`` at most in its Unicode normal form.

    A file that macOS or a cloud drive named in decomposed letters is found by a name in composed ones. If no
    such path exists, ``path`` is returned.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    found = Path(Path(path).anchor)
    for part in Path(path).parts[1 if Path(path).anchor else 0 :]:
        entry = found / part
        if not os.path.lexists(entry):
            same = _names_by_normal_form(str(found)).get(unicodedata.normalize("NFC", part))
            if same is None:
                return path
            entry = found / same
        found = entry
    return str(found)


@lru_cache(maxsize=16)
def _names_by_normal_form(folder: str) -> dict[str, str]:
    try:
        names = [entry.name for entry in Path(folder).iterdir()]
    except OSError:
        return {}
    return {unicodedata.normalize("NFC", name): name for name in names if not name.isascii()}


def _similar_names(folder: Path, name: str) -> list[str]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        names = []
    return get_close_matches(name, names, n=1)


def _matches(pattern: Path) -> bool:
    """Return whether any file matches, with ``[`` and ``?`` taken literally or as parts of the pattern."""
    rest = str(pattern.relative_to(pattern.anchor))
    literal = re.sub(r"([\[?])", r"[\1]", rest)
    return any(any(Path(pattern.anchor).glob(text)) for text in dict.fromkeys([literal, rest]))


def copy_into(folder: Path, files: Iterable[str | Path]) -> None:
    """Copy files into a folder, except those that are in it already."""
    for file in map(Path, files):
        copy = folder / file.name
        if not (copy.exists() and copy.samefile(file)):
            shutil.copy(file, copy)


# -------------------------------------------------------------------------------------- all of a job


@dataclass(frozen=True)
class PathField:
    """Marks a field of a settings model as a path.

    Attributes:
        resolve: takes the value and the field's name; returns the absolute path or raises `ConfigError`.
        is_input: whether the job reads from it.
    """

    resolve: Callable[[str, str], str | Path]
    is_input: bool


InputPath = Annotated[str, PathField(input_path, is_input=True)]
ModelPath = Annotated[str, PathField(model_path, is_input=True)]
ArtifactPath = Annotated[str, PathField(artifact_path, is_input=True)]
OutputPath = Annotated[str, PathField(output_path, is_input=False)]
OutputFolder = Annotated[str, PathField(output_folder, is_input=False)]


def resolve_paths(config: M) -> M:
    """Return a copy of a job's settings in which every path is absolute.

    Raises:
        ConfigError: lists every path that does not exist or cannot be used.
    """
    problems = Problems("paths")

    def resolve(field: PathField, value: str, name: str) -> str:
        found = problems.collect(lambda: str(field.resolve(value, name)))
        return value if found is None else found

    resolved: M = _map_model(config, "", resolve)
    problems.raise_any()
    return resolved


def real_paths(config: BaseModel) -> dict[str, str]:
    """Return the real path of every input, by the field's dotted name.

    URLs, Hugging Face ids and paths that do not exist stay unchanged.
    """
    found: dict[str, str] = {}

    def note(field: PathField, value: str, name: str) -> str:
        if field.is_input:
            found[name] = _real_path(value)
        return value

    _map_model(config, "", note)
    return found


def _real_path(path: str) -> str:
    if "://" in path:
        return path
    try:
        return os.path.realpath(input_path(path, ""))
    except ConfigError:
        return path


_Change = Callable[[PathField, str, str], str]


def _map_model(model: M, prefix: str, change: _Change) -> M:
    """Return a copy of ``model`` with ``change(field, value, dotted name)`` for each path in it."""
    update = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        changed = _map_value(info.annotation, info.metadata, value, prefix + name, change)
        if changed is not value:
            update[name] = changed
    return model.model_copy(update=update)


def _map_value(annotation: Any, metadata: Iterable[Any], value: Any, name: str, change: _Change) -> Any:
    """Return ``value``, declared as ``annotation`` and ``metadata``, with the paths in it changed."""
    if value is None:
        return None
    if isinstance(value, BaseModel):
        return _map_model(value, f"{name}.", change)
    for mark in metadata:
        if isinstance(mark, PathField):
            return change(mark, value, name)
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return _map_value(inner[0], inner[1:], value, name, change)
    if kind in (Union, UnionType):
        for member in inner:
            value = _map_value(member, (), value, name, change)
    elif isinstance(value, list | tuple) and inner:
        return type(value)(
            _map_value(inner[0], (), one, f"{name}.{number}", change) for number, one in enumerate(value)
        )
    elif isinstance(value, Mapping) and inner:
        return {key: _map_value(inner[1], (), one, f"{name}.{key}", change) for key, one in value.items()}
    return value
