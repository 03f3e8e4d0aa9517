"""Errors of the endpoint that are not the engine's::

    SkipVisionError
    ├── InputError
    │   ├── MediaError           an image of a request cannot be fetched or used; `code` is the reason
    │   ├── SchemaError          no answer can follow the JSON schema
    │   └── LengthError          prompt and answer exceed the model's positions
    ├── AuthenticationError      no API key, or an unknown one
    ├── OverloadedError          too many requests at once; try again later
    ├── NotLoadedError           the engine has not loaded the adapter yet
    └── DeadlineError            nothing was generated before the deadline

Messages go to clients. They name what the client sent, and reveal nothing about the internal network.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from skipvision.errors import InputError, SkipVisionError

MediaCode = Literal[
    "media_url_invalid",  # malformed URL, scheme or base64, or a URL with credentials
    "media_host_not_allowed",  # host, port or address
    "media_unreachable",  # no connection, a response without an image, or an interrupted one
    "media_timeout",
    "media_too_large",  # bytes or pixels
    "media_format",  # not an image of an allowed format, or a damaged image
]


class MediaError(InputError):
    """An image of a request cannot be fetched or used.

    Attributes:
        code: machine-readable reason.
    """

    def __init__(self, message: str, code: MediaCode) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, MediaCode]]:
        return type(self), (str(self), self.code)


class SchemaError(InputError):
    """No answer can follow the JSON schema of a request."""

    code: ClassVar = "invalid_json_schema"
    param: ClassVar = "response_format"


class LengthError(InputError):
    """The prompt leaves no room for the answer."""

    code: ClassVar = "context_length_exceeded"
    param: ClassVar = "messages"


class AuthenticationError(SkipVisionError):
    """The request has no API key, or an unknown one."""

    code: ClassVar = "invalid_api_key"


class OverloadedError(SkipVisionError):
    """More requests run at once than are allowed.

    Attributes:
        retry_after: when to try again (s).
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotLoadedError(SkipVisionError):
    """The engine has not loaded the adapter yet.

    Attributes:
        retry_after: when to try again (s).
    """

    code: ClassVar = "adapter_not_loaded"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(SkipVisionError):
    """Nothing was generated before the deadline of the request."""

    code: ClassVar = "timeout"

    def __init__(self, message: str = "no answer within the time limit: try again") -> None:
        super().__init__(message)
