"""The errors that the project raises on purpose, as one tree::

    SkipVisionError
    ├── ConfigError            a setting or a combination of settings is invalid
    ├── UnsupportedModelError  Skip-Vision cannot be attached to a model
    ├── InputError             inputs of a forward pass contradict each other or the model
    ├── AdapterError           a saved adapter is missing, damaged or for another model
    ├── GenerationError        the model cannot answer a request
    ├── DataError              a data set has no usable row, or a bad row that must not be skipped
    └── ResourceError          a request needs more than the cluster has

Every message states the problem, the value that caused it, and the remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SkipVisionError(Exception):
    """Base class of all errors that this project raises on purpose."""


class ConfigError(SkipVisionError, ValueError):
    """A setting or a combination of settings is invalid."""


class UnsupportedModelError(SkipVisionError, TypeError):
    """Skip-Vision cannot be attached to a model.

    Attributes:
        reason: why, in a few words that name no model; by default the whole message.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


class InputError(SkipVisionError, ValueError):
    """Inputs of a forward pass contradict each other or the model."""


class AdapterError(SkipVisionError, ValueError):
    """A saved adapter is missing, damaged or for another model."""


class GenerationError(SkipVisionError, RuntimeError):
    """The model cannot answer a request."""


class DataError(SkipVisionError, ValueError):
    """A data set has no usable row, or a bad row that must not be skipped."""


class ResourceError(SkipVisionError, RuntimeError):
    """A request needs more than the cluster has."""


class Problems:
    """Collects the errors of several checks, which are raised together.

    Args:
        heading: what the problems are about, as in "3 problems with this export"; None = no first line.
    """

    def __init__(self, heading: str | None = None) -> None:
        self._heading, self._found = heading, list[SkipVisionError]()

    def collect(self, check: Callable[[], Any]) -> Any:
        """Return the result of a check, or None after keeping its error."""
        try:
            return check()
        except SkipVisionError as error:
            self._found.append(error)
            return None

    def raise_any(self) -> None:
        """Raise a single error itself, and several as a `ConfigError` with a line for each."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found and self._heading is None:
            raise ConfigError("\n".join(map(str, self._found)))
        if self._found:
            title = f"{len(self._found)} problems with {self._heading}"
            raise ConfigError("\n  ".join([title, *map(str, self._found)]))
