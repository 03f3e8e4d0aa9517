"""What can go wrong before a request reaches the engine::

    SkipVisionError
    ├── InputError
    │   ├── MediaError           an image of a request that cannot be had or used; `code` says why
    │   └── SchemaError          a JSON schema that no answer can be written to
    ├── AuthenticationError      no API key, or none that is known
    ├── OverloadedError          more requests at once than are allowed; later they may be
    ├── NotLoadedError           an adapter that its engine does not have yet
    └── DeadlineError            nothing was written when the time for the answer was over

Messages go to clients: they name what the client sent, never what lies behind the server.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from skipvision.errors import InputError, SkipVisionError

MediaCode = Literal[
    "media_url_invalid",  # not a URL that is understood: its scheme, base64, credentials
    "media_host_not_allowed",  # host, port or address that nothing is fetched from
    "media_unreachable",  # no connection, not an answer with an image, or one that breaks off
    "media_timeout",
    "media_too_large",  # bytes or pixels
    "media_format",  # not an image of an allowed format, or a damaged one
]


class MediaError(InputError):
    """An image of a request that cannot be had or used.

    Attributes:
        code: why, for programs.
    """

    def __init__(self, message: str, code: MediaCode) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, MediaCode]]:
        return type(self), (str(self), self.code)


class SchemaError(InputError):
    """A JSON schema that no answer can be written to."""

    code: ClassVar = "invalid_json_schema"
    param: ClassVar = "response_format"


class AuthenticationError(SkipVisionError):
    """No API key, or none that is known."""

    code: ClassVar = "invalid_api_key"


class OverloadedError(SkipVisionError):
    """More requests at once than are allowed.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotLoadedError(SkipVisionError):
    """An adapter that its engine does not have yet.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    code: ClassVar = "adapter_not_loaded"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(SkipVisionError):
    """Nothing was written when the time for the answer was over."""

    code: ClassVar = "timeout"

    def __init__(self, message: str = "there was no answer in the time for one: try again") -> None:
        super().__init__(message)
