"""A small internet on 127.0.0.1: servers, names, and fetchers that may reach them."""

import asyncio
import base64
import contextlib
import io
import socket
import struct
import zlib
from ipaddress import ip_address

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from PIL import Image

from serve.errors import MediaError
from serve.media.addresses import is_public
from serve.media.config import MediaConfig
from serve.media.fetch import MediaFetcher

RED = (255, 0, 0)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encode(Image.new("RGB", (4, 3), RED))


def bomb(width, height):
    """A PNG whose header declares many pixels that its few bytes do not hold."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Names(AbstractResolver):
    """Resolves every name to 127.0.0.1, or to the given addresses: ``name=[first reply, second, …]``."""

    def __init__(self, **answers):
        self.answers = answers
        self.queries = []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.queries.append(host)
        answers = self.answers.get(host.partition(".")[0], [["127.0.0.1"]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise OSError(None, "no such name on 10.0.0.53")
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in addresses
        ]

    async def close(self):
        pass


def public_or_loopback(address):
    return is_public(address) or address == ip_address("127.0.0.1")


class Site:
    """A server with one response for every request; records the requests."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.port = 0

    async def __call__(self, request):
        self.requests.append(request)
        answer = self.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer


@contextlib.asynccontextmanager
async def serving(answer, tls=None):
    site = Site(answer)
    runner = web.ServerRunner(web.Server(site), shutdown_timeout=0)
    await runner.setup()
    try:
        place = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await place.start()
        site.port = runner.addresses[0][1]
        yield site
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def sending_bytes(data):
    """A server that sends these raw bytes to every request and closes the connection."""

    async def send(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(send, "127.0.0.1", 0)
    try:
        site = Site(None)
        site.port = server.sockets[0].getsockname()[1]
        yield site
    finally:
        server.close()
        await server.wait_closed()


def media_config(*sites, **settings):
    ports = tuple(site.port for site in sites)
    return MediaConfig(**{"allowed_hosts": ("*.test",), "allowed_ports": ports} | settings)


def fetcher(*sites, names=None, tls=None, **settings):
    return MediaFetcher(
        media_config(*sites, **settings),
        resolver=names or Names(),
        address_allowed=public_or_loopback,
        tls=tls,
    )


def fetch_from(answer, path="/image", *, names=None, **settings):
    """Fetch one URL from a server with this response."""

    async def run():
        site = sending_bytes(answer) if isinstance(answer, bytes) else serving(answer)
        async with site as server, fetcher(server, names=names, **settings) as media:
            return (await media.fetch(f"http://images.test:{server.port}{path}")).open()

    return asyncio.run(run())


def assert_refused(answer, code, message=None, path="/image", **settings):
    with pytest.raises(MediaError, match=message) as caught:
        fetch_from(answer, path, **settings)
    assert caught.value.code == code
    assert "127.0.0.1" not in str(caught.value)
    return str(caught.value)


def fetch_url(url, **settings):
    """Fetch a URL under the rules of production: the system's resolver, public addresses only."""

    async def run():
        async with MediaFetcher(MediaConfig(**settings)) as media:
            return (await media.fetch(url)).open()

    return asyncio.run(run())


def assert_url_refused(url, code, message=None, **settings):
    with pytest.raises(MediaError, match=message) as caught:
        fetch_url(url, **settings)
    assert caught.value.code == code
    return str(caught.value)


def redirect(target):
    return web.Response(status=302, headers={"Location": target})


def image_response(_):
    return web.Response(body=PNG, content_type="image/png")
