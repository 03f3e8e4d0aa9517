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
