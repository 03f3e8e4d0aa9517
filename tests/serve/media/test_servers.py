"""Servers that are slow, unreachable, or respond with something else."""

import asyncio
import contextlib
import socket
import time

import pytest
from aiohttp import web

from serve.errors import MediaError
from tests.serve.media.site import Names, Site, assert_refused, fetcher, image_response, redirect


@pytest.mark.parametrize("before_headers", [True, False])
def test_slow_servers_time_out(before_headers):
    async def answer(request):
        response = web.StreamResponse()
        if not before_headers:
            await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(6):
                await asyncio.sleep(0.1)
                if not before_headers:
                    await response.write(b"x")
        return response

    assert_refused(answer, "media_timeout", "within 0.2 seconds", total_seconds=0.2)


def test_redirects_share_one_time_limit():
    async def answer(request):
        await asyncio.sleep(0.1)
        return redirect(request.path + "x")

    assert_refused(answer, "media_timeout", total_seconds=0.25, max_redirects=100)


def test_a_connection_that_does_not_complete_times_out():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # fill the queue, so that further connections wait
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.1", port))

            async def run():
                site = Site(None)
                site.port = port
                async with fetcher(site, connect_seconds=0.1) as media:
                    await media.fetch(f"http://images.test:{port}/")

            start = time.monotonic()
            with pytest.raises(MediaError) as caught:
                asyncio.run(run())
            assert time.monotonic() - start < 0.9  # not the 20 seconds that an image may take
    assert caught.value.code == "media_timeout"


def test_a_host_without_a_server_is_unreachable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # but does not listen
        site = Site(None)
        site.port = taken.getsockname()[1]

        async def run():
            async with fetcher(site) as media:
                await media.fetch(f"http://images.test:{site.port}/")

        with pytest.raises(MediaError, match="no connection to the host") as caught:
            asyncio.run(run())
    assert caught.value.code == "media_unreachable"
    assert "127.0.0.1" not in str(caught.value)


def test_an_unknown_name_is_unreachable():
    assert "10.0.0.53" not in assert_refused(
        image_response, "media_unreachable", "cannot be resolved", names=Names(images=[[]])
    )


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_responses_with_another_status_are_refused(status):
    assert_refused(lambda _: web.Response(status=status), "media_unreachable", f"status {status}")


@pytest.mark.parametrize("answer", [b"\x00\x01\x02 nonsense\r\n\r\n", b"", b"HTTP/1.1 302 Found\r\n\r\n"])
def test_servers_that_do_not_speak_http_are_refused(answer):
    assert_refused(answer, "media_unreachable")
