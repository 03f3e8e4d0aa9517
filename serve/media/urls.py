"""Parse image URLs strictly, and shorten them for messages."""

from __future__ import annotations

from yarl import URL

from serve.errors import MediaError
from serve.media.addresses import normal_host

MAX_URL_LENGTH = 8192
"""Length limit of an http(s) URL (characters)."""


def parse_url(url: str, base: URL | None) -> URL:
    """Return an absolute http(s) URL. The connection uses this parsed form, so no second parser can differ.

    Args:
        url: as the client or a redirect gave it.
        base: the URL that redirected here; None for the first.

    Raises:
        MediaError: the URL is malformed.
    """
    if len(url) > MAX_URL_LENGTH:
        raise MediaError(
            f"image URL of {len(url):,} characters; at most {MAX_URL_LENGTH:,}, or a data URL",
            "media_url_invalid",
        )
    try:
        parsed = URL(url) if base is None else base.join(URL(url))
        scheme, port = parsed.scheme, parsed.port
        if scheme in ("http", "https"):
            normal_host(parsed.raw_host or "")
    except ValueError:  # its message quotes the URL, which may contain secrets
        raise MediaError(
            "image URL is not a valid URL; check its host and port", "media_url_invalid"
        ) from None
    if scheme not in ("http", "https"):
        raise MediaError(
            f"image URL has the scheme {shortened(scheme)}; send a data, http or https URL",
            "media_url_invalid",
        )
    if not port:
        raise MediaError(f"image URL has the invalid port {port}", "media_url_invalid")
    return parsed


def origin(url: URL) -> str:
    """Return a URL's scheme, host and port for messages. Path, query and credentials may hold secrets."""
    return shortened(str(url.origin()))


def shortened(text: str) -> str:
    """Return the quoted text, cut to 80 characters."""
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
