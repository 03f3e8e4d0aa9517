"""Where a job's relative paths lead.

Under ``ray job submit`` a job runs in a throw-away copy of the project: what it writes there is lost
with the copy, and which folder the copy was made of cannot be known. So relative paths are resolved
against ``$SKIPVISION_HOME`` if that is set, otherwise against the working directory; only that inside
a Ray job the latter is refused for outputs (inputs may well have travelled with the copy).
"""

from __future__ import annotations

import os
from pathlib import Path

from skipvision.errors import ConfigError

HOME = "SKIPVISION_HOME"
"""Environment variable: the folder that relative paths are resolved against."""


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


def _matches(pattern: Path) -> bool:
    return any(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
