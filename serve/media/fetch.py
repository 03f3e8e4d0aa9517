"""The images that requests name: fetched from data URLs and allowed hosts, decoded within limits.

A URL in a request is written by a stranger and opened by a machine inside the network, so:

- the host must be named in `MediaConfig.allowed_hosts`, which is empty by default;
- the address is judged where the socket is made, so nothing that happens between a name's look-up and
  the connection (DNS rebinding), and no spelling of an address, gets around it;
- redirects are followed here, one by one, each under the same rules;
- bytes are counted as they arrive, pixels before they are unpacked, and time over the whole;
- what cannot be had is refused as a `MediaError` that says nothing of what lies behind the server.

No proxy is used, whatever the environment says: behind one, addresses could not be judged.
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal, NoReturn, Self, TypeVar

import aiohttp
from aiohttp.abc import AbstractResolver
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator
from yarl import URL

from pipelines.data.images import ImageError, OversizedImageError, decode, size_of
from serve.errors import MediaError
from serve.media.addresses import IPAddress, host_allowed, is_public, normal_host, normal_pattern

T = TypeVar("T")

MAX_URL_LENGTH = 8192
"""Characters of an http(s) URL; longer ones are refused."""

_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "Skip-Vision"}
_REDIRECTS = (301, 302, 303, 307, 308)


class MediaConfig(BaseModel):
    """Which images are fetched, from where, and how much of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="hosts that images are fetched from: names, *.example.org for everything below it, "
        "* for every host of the public internet; none given = only data URLs",
    )
    allowed_ports: tuple[int, ...] = Field(
        (80, 443), description="ports that images are fetched from (numbers)"
    )
    max_bytes: int = Field(20 * 2**20, ge=1, description="size of one encoded image (bytes)")
    max_pixels: int = Field(25_000_000, ge=1, description="width × height of one image (pixels)")
    formats: tuple[Literal["JPEG", "PNG", "WEBP", "GIF"], ...] = Field(
        ("JPEG", "PNG", "WEBP", "GIF"), min_length=1, description="formats that are decoded; first frame only"
    )
    connect_seconds: float = Field(5.0, gt=0, description="time for one connection, TLS included (s)")
    total_seconds: float = Field(
        20.0, gt=0, description="time for one image, waiting for a free connection and redirects included (s)"
    )
    max_redirects: int = Field(3, ge=0, description="redirects followed for one image (count)")
    max_connections: int = Field(32, ge=1, description="images downloaded at the same time (count)")
    max_connections_per_host: int = Field(
        8, ge=1, description="… of them from the same host and port (count)"
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _normal(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(normal_pattern(pattern) for pattern in patterns)


@dataclass(frozen=True)
class EncodedImage:
    """An image as it was sent, judged by its header only.

    Attributes:
        data: the file.
        name: for messages.
        size: width and height (pixels), before it is turned upright.
        config: under which it may be decoded.
    """

    data: bytes = field(repr=False)
    name: str
    size: tuple[int, int]
    config: MediaConfig

    def open(self) -> Image.Image:
        """Upright RGB; raises `MediaError`. Takes time and memory: for a thread that is there for it."""
        return _judged(decode, self.data, self.name, self.config)


class MediaFetcher:
    """Images by URL; belongs to one event loop, and is closed by `close` or at the end of ``async with``.

    Args:
        config: the limits.
        resolver: looks up names instead of the system.
        address_allowed: which addresses may be connected to. Only tests want others than public ones.
        tls: which certificates are trusted, instead of the system's.
    """

    def __init__(
        self,
        config: MediaConfig,
        *,
        resolver: AbstractResolver | None = None,
        address_allowed: Callable[[IPAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.config = config
        self._resolver = resolver
        self._address_allowed = address_allowed
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, url: str) -> EncodedImage:
        """The image behind a data URL or an http(s) URL; raises `MediaError`."""
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(_from_data_url, url, self.config)
        checked = self._checked(url)
        data = await self._download(checked)
        return await asyncio.to_thread(_encoded, data, f"at {_place(checked)}", self.config)

    async def close(self) -> None:
        """Drop all connections; nothing can be fetched from hosts afterwards."""
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------ what may be fetched

    def _checked(self, url: str, base: URL | None = None) -> URL:
        """The URL, if it may be fetched from; ``base`` is where a redirect to it came from."""
        config = self.config
        parsed = _parsed(url, base)
        # Where a server redirects to may be something that only it should know.
        image = f"image at {_place(parsed)}" if base is None else f"image at {_place(base)}, redirected"
        if parsed.raw_user is not None or parsed.raw_password is not None:
            raise MediaError(
                f"{image}: user names and passwords in URLs are not sent; leave them out", "media_url_invalid"
            )
        if not config.allowed_hosts:
            reason = "images are not fetched from the network here"
        elif base is not None and base.scheme == "https" and parsed.scheme == "http":
            reason = "https does not become http"
        elif parsed.port not in config.allowed_ports:
            reason = f"port {parsed.port} is not allowed, only {', '.join(map(str, config.allowed_ports))}"
        elif not host_allowed(normal_host(parsed.raw_host or ""), config.allowed_hosts):
            reason = "images are not fetched from this host"
        else:
            return parsed
        raise MediaError(f"{image}: {reason}; send it as a data URL", "media_host_not_allowed")

    def _socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """A socket for the address that is about to be connected to, whoever looked it up."""
        family, kind, protocol, _, address = info
        if not self._address_allowed(ip_address(address[0])):
            raise _AddressNotAllowed("the address is not public")
        return socket.socket(family, kind, protocol)

    # ------------------------------------------------------------------------------------- downloading

    async def _download(self, url: URL) -> bytes:
        place = _place(url)
        try:
            async with asyncio.timeout(self.config.total_seconds):
                for _ in range(self.config.max_redirects + 1):
                    answer = await self._answer(url)
                    if isinstance(answer, bytes):
                        return answer
                    url = self._checked(answer, base=url)
        except TimeoutError:
            raise MediaError(
                f"image at {place}: not received within {self.config.total_seconds:g} seconds "
                f"({self.config.connect_seconds:g} for each connection)",
                "media_timeout",
            ) from None
        except aiohttp.ClientError as error:
            _refuse(error, _place(url))
        raise MediaError(
            f"image at {place}: redirects more than {self.config.max_redirects} times", "media_unreachable"
        )

    async def _answer(self, url: URL) -> bytes | str:
        """The encoded image, or where it is instead."""
        async with self._connected().get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            if response.status != 200:
                raise MediaError(
                    f"image at {_place(url)}: the host answers with status {response.status}",
                    "media_unreachable",
                )
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise MediaError(
                    f"image at {_place(url)}: the host sends it encoded as {_short(encoding)}, not as it is",
                    "media_format",
                )
            return await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        data = bytearray()
        _check_size(response.content_length or 0, f"at {_place(response.url)}", self.config)
        async for part in response.content.iter_any():
            data += part
            _check_size(len(data), f"at {_place(response.url)}", self.config)
        return bytes(data)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self.config.max_connections,
                limit_per_host=self.config.max_connections_per_host,
                resolver=self._resolver,
                socket_factory=self._socket,
                ssl=self._tls or True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),  # one request's server leaves nothing for the next
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_seconds),
                auto_decompress=False,
            )
        return self._session


class _AddressNotAllowed(OSError):
    """Raised in place of connecting; an OSError, so that other addresses of the same name are tried."""


def _refuse(error: aiohttp.ClientError, place: str) -> NoReturn:
    """Say what failed in our own words: those of the network name addresses."""
    match error:
        case aiohttp.InvalidURL():
            raise MediaError(f"image at {place}: not a valid URL", "media_url_invalid") from None
        case aiohttp.ClientConnectorError(os_error=_AddressNotAllowed()):
            raise MediaError(
                f"image at {place}: images are not fetched from private addresses; send it as a data URL",
                "media_host_not_allowed",
            ) from None
        case aiohttp.ClientConnectorDNSError():
            reason = "no such host is known"
        case aiohttp.ClientSSLError():
            reason = "the host has no valid certificate"
        case aiohttp.ClientConnectorError():
            reason = "no connection to the host"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            reason = "the connection broke off"
        case _:
            reason = "the host does not answer as a web server should"
    raise MediaError(f"image at {place}: {reason}", "media_unreachable") from None


# --------------------------------------------------------------------------------------- reading URLs


def _parsed(url: str, base: URL | None) -> URL:
    """An absolute http(s) URL, in the one reading that is also connected to."""
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
    except ValueError:  # the URL itself may hold secrets
        raise MediaError(
            "image URL is not a valid URL; check its host and port", "media_url_invalid"
        ) from None
    if scheme not in ("http", "https"):
        raise MediaError(
            f"image URL has the scheme {_short(scheme)}; send a data, http or https URL", "media_url_invalid"
        )
    if not port:
        raise MediaError(f"image URL has the port {port}, which is none", "media_url_invalid")
    return parsed


def _place(url: URL) -> str:
    """A URL for messages: no path, query or credentials, for they may hold secrets."""
    return _short(str(url.origin()))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


# ------------------------------------------------------------------- in a thread: URLs and bytes to images


def _from_data_url(url: str, config: MediaConfig) -> EncodedImage:
    image = "in the data URL"
    head, comma, text = url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or parameters[-1:] != ["base64"]:
        raise MediaError(
            f"image {image}: write data:image/png;base64,… and not {_short(url[:40])}", "media_url_invalid"
        )
    allowed = [f"image/{name.lower()}" for name in config.formats]
    if kind not in allowed and not (kind == "image/jpg" and "image/jpeg" in allowed):
        raise MediaError(
            f"image {image}: its type is {_short(kind)}; allowed are {', '.join(allowed)}", "media_format"
        )
    _check_size(len(text) * 3 // 4 - text[-2:].count("="), image, config)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MediaError(f"image {image}: not valid base64: {error}", "media_url_invalid") from None
    return _encoded(data, image, config)


def _encoded(data: bytes, name: str, config: MediaConfig) -> EncodedImage:
    return EncodedImage(data, name, _judged(size_of, data, name, config), config)


def _judged(read: Callable[..., T], data: bytes, name: str, config: MediaConfig) -> T:
    try:
        return read(io.BytesIO(data), name, config.max_pixels, config.formats)
    except OversizedImageError as error:
        raise MediaError(str(error), "media_too_large") from None
    except ImageError as error:
        raise MediaError(str(error), "media_format") from None


def _check_size(size: int, name: str, config: MediaConfig) -> None:
    if size > config.max_bytes:
        raise MediaError(f"image {name}: more than {config.max_bytes:,} bytes", "media_too_large")
