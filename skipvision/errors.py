"""What can go wrong, as one tree::

    SkipVisionError
    ├── ConfigError            a setting, or a combination of settings, that cannot be honoured
    ├── UnsupportedModelError  a model that Skip-Vision cannot be attached to
    ├── InputError             inputs of one forward pass that contradict each other or the model
    ├── AdapterError           a saved adapter that is missing, damaged or made for something else
    ├── GenerationError        a request that the model could not answer
    ├── DataError              a data set with nothing usable, or with a bad row that must not be skipped
    └── ResourceError          a request for more than the cluster has

Every message says what was wrong, with which value, and what to do about it.
"""

from __future__ import annotations


class SkipVisionError(Exception):
    """Root of all errors raised on purpose by this project."""


class ConfigError(SkipVisionError, ValueError):
    """A setting, or a combination of settings, that cannot be honoured."""


class UnsupportedModelError(SkipVisionError, TypeError):
    """A model that Skip-Vision cannot be attached to.

    Attributes:
        reason: why, in a few words that name no model; the whole message where there are none.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


class InputError(SkipVisionError, ValueError):
    """Inputs of one forward pass that contradict each other or the model."""


class AdapterError(SkipVisionError, ValueError):
    """A saved adapter that is missing, damaged or made for something else."""


class GenerationError(SkipVisionError, RuntimeError):
    """A request that the model could not answer."""


class DataError(SkipVisionError, ValueError):
    """A data set with nothing usable, or with a bad row that must not be skipped."""


class ResourceError(SkipVisionError, RuntimeError):
    """A request for more than the cluster has."""
