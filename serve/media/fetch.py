"""Fetch the images that requests name, from data URLs and allowed hosts.

A stranger writes the URL, and a machine inside the network opens it. Therefore:

- `MediaConfig.allowed_hosts` must name the host; by default it names none.
- The address is checked when the socket is created, so neither DNS rebinding nor an unusual spelling of an
  address gets around the check.
- Redirects are followed here, one by one, under the same rules.
- Bytes are counted while they arrive, pixels are read from the header before decoding, and one timeout
  covers the whole download.
- A refusal is a `MediaError` whose message reveals nothing about the internal network.

Proxies from the environment are ignored: a proxy would hide the address from the check.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_address
from typing import NoReturn, Self

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from serve.errors import MediaError
from serve.media.addresses import IPAddress, host_allowed, is_public, normal_host
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage, check_bytes
from serve.media.urls import origin, parse_url, shortened

_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "Skip-Vision"}
_REDIRECTS = (301, 302, 303, 307, 308)


class MediaFetcher:
    """Fetches images by URL on one event loop. Close it with `close` or ``async with``.

    Args:
        config: the limits.
        resolver: resolves names in place of the system's resolver.
        address_allowed: decides which addresses may be connected to; tests allow a local server.
        tls: trusted certificates in place of the system's.
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
        """Return the image at a data URL or an http(s) URL. Raise `MediaError`."""
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(EncodedImage.from_data_url, url, self.config)
        checked = self._check(url)
        data = await self._download(checked)
        return await asyncio.to_thread(EncodedImage.read, data, f"at {origin(checked)}", self.config)

    async def close(self) -> None:
        """Close all connections. Later fetches from hosts fail."""
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --------------------------------------------------------------------------- which URLs are allowed

    def _check(self, url: str, base: URL | None = None) -> URL:
        """Return the parsed URL if the settings allow it; ``base`` is the URL that redirected to it."""
        config = self.config
        parsed = parse_url(url, base)
        # A redirect's target stays out of messages: it may be known to the server alone.
        image = f"image at {origin(parsed)}" if base is None else f"image at {origin(base)}, redirected"
        if parsed.raw_user is not None or parsed.raw_password is not None:
            raise MediaError(
                f"{image}: user names and passwords in URLs are not sent; leave them out", "media_url_invalid"
            )
        if not config.allowed_hosts:
            reason = "images are not fetched from the network here"
        elif base is not None and base.scheme == "https" and parsed.scheme == "http":
            reason = "a redirect from https to http is not followed"
        elif parsed.port not in config.allowed_ports:
            reason = f"port {parsed.port} is not allowed, only {', '.join(map(str, config.allowed_ports))}"
        elif not host_allowed(normal_host(parsed.raw_host or ""), config.allowed_hosts):
            reason = "images are not fetched from this host"
        else:
            return parsed
        raise MediaError(f"{image}: {reason}; send it as a data URL", "media_host_not_allowed")

    def _create_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """Create the socket for a connection if its address is allowed, however the name was resolved."""
        family, kind, protocol, _, address = info
        if not self._address_allowed(ip_address(address[0])):
            raise _AddressNotAllowed("the address is not public")
        return socket.socket(family, kind, protocol)

    # ----------------------------------------------------------------------------------------- download

    async def _download(self, url: URL) -> bytes:
        place = origin(url)
        try:
            async with asyncio.timeout(self.config.total_seconds):
                for _ in range(self.config.max_redirects + 1):
                    found = await self._get(url)
                    if isinstance(found, bytes):
                        return found
                    url = self._check(found, base=url)
        except TimeoutError:
            raise MediaError(
                f"image at {place}: not received within {self.config.total_seconds:g} seconds "
                f"({self.config.connect_seconds:g} for each connection)",
                "media_timeout",
            ) from None
        except aiohttp.ClientError as error:
            _refuse(error, origin(url))
        raise MediaError(
            f"image at {place}: redirects more than {self.config.max_redirects} times", "media_unreachable"
        )

    async def _get(self, url: URL) -> bytes | str:
        """Return the encoded image, or the target of a redirect."""
        async with self._connected().get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                return response.headers["Location"]
            if response.status != 200:
                raise MediaError(
                    f"image at {origin(url)}: the host responded with status {response.status}",
                    "media_unreachable",
                )
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise MediaError(
                    f"image at {origin(url)}: the host sent it encoded as {shortened(encoding)}, "
                    "which is not accepted",
                    "media_format",
                )
            return await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        data, name = bytearray(), f"at {origin(response.url)}"
        check_bytes(response.content_length or 0, name, self.config)
        async for part in response.content.iter_any():
            data += part
            check_bytes(len(data), name, self.config)
        return bytes(data)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self.config.max_connections,
                limit_per_host=self.config.max_connections_per_host,
                resolver=self._resolver,
                socket_factory=self._create_socket,
                ssl=self._tls or True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),  # no state passes from one request to the next
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_seconds),
                auto_decompress=False,
            )
        return self._session


class _AddressNotAllowed(OSError):
    """Raised instead of connecting. As an OSError it makes aiohttp try the name's other addresses."""


def _refuse(error: aiohttp.ClientError, place: str) -> NoReturn:
    """Raise `MediaError` in our own words: aiohttp's messages contain addresses."""
    match error:
        case aiohttp.InvalidURL():
            raise MediaError(f"image at {place}: not a valid URL", "media_url_invalid") from None
        case aiohttp.ClientConnectorError(os_error=_AddressNotAllowed()):
            raise MediaError(
                f"image at {place}: images are not fetched from private addresses; send it as a data URL",
                "media_host_not_allowed",
            ) from None
        case aiohttp.ClientConnectorDNSError():
            reason = "the host name cannot be resolved"
        case aiohttp.ClientSSLError():
            reason = "the host has no valid certificate"
        case aiohttp.ClientConnectorError():
            reason = "no connection to the host"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            reason = "the connection broke off"
        case _:
            reason = "the host does not respond as a web server should"
    raise MediaError(f"image at {place}: {reason}", "media_unreachable") from None
