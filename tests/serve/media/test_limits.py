"""Limits on bytes and pixels, and data that is not an image."""

import contextlib
import gzip

import pytest
from aiohttp import web
from PIL import Image

from serve.errors import MediaError
from tests.serve.media.site import (
    PNG,
    assert_refused,
    assert_url_refused,
    bomb,
    data_url,
    encode,
    fetch_from,
    fetch_url,
    image_response,
)


def test_the_byte_limit_is_exact():
    assert fetch_from(image_response, max_bytes=len(PNG)).size == (4, 3)
    assert_refused(image_response, "media_too_large", "more than", max_bytes=len(PNG) - 1)
    assert fetch_url(data_url(PNG), max_bytes=len(PNG)).size == (4, 3)
    assert_url_refused(data_url(PNG), "media_too_large", "more than", max_bytes=len(PNG) - 1)


def test_a_content_length_over_the_limit_is_refused_before_the_body():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
    assert_refused(head, "media_too_large", "more than 20,971,520 bytes")


def test_an_endless_body_is_cut_off():
    sent = 0

    async def answer(request):
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(10_000))
                sent += 10_000
        return response

    assert_refused(answer, "media_too_large", max_bytes=100_000)
    assert sent < 20_000_000  # as much as the socket buffers hold


@pytest.mark.parametrize(
    ("declared", "code"),
    [(len(PNG) + 100, "media_unreachable"), ("many", "media_unreachable")],
)
def test_wrong_content_lengths_are_refused(declared, code):
    assert_refused(f"HTTP/1.1 200 OK\r\nContent-Length: {declared}\r\n\r\n".encode() + PNG, code)


def test_bytes_past_the_content_length_are_not_read():
    with pytest.raises(MediaError):  # a truncated image, or bytes after the end of a response
        fetch_from(f"HTTP/1.1 200 OK\r\nContent-Length: {len(PNG) - 20}\r\n\r\n".encode() + PNG)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_compressed_responses_are_refused_without_unpacking(encoding):
    body = gzip.compress(bytes(50_000_000), 1)

    def answer(_):
        return web.Response(body=body, headers={"Content-Encoding": encoding})

    assert_refused(answer, "media_format", "encoded as")


def test_identity_encoding_is_accepted():
    assert fetch_from(lambda _: web.Response(body=PNG, headers={"Content-Encoding": "Identity"})).size == (
        4,
        3,
    )


@pytest.mark.parametrize("size", [(10_000, 10_000), (1_000_000, 1_000_000)])
def test_decompression_bombs_are_refused(size):
    assert len(bomb(*size)) < 200
    assert_refused(lambda _: web.Response(body=bomb(*size)), "media_too_large", "pixels")
    assert_url_refused(data_url(bomb(*size)), "media_too_large", "pixels")


def test_the_pixel_limit_is_exact():
    assert fetch_url(data_url(PNG), max_pixels=12).size == (4, 3)
    assert_url_refused(data_url(PNG), "media_too_large", "4 × 3 pixels, more than 11", max_pixels=11)


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>Not found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encode(Image.new("RGB", (4, 3)), "TIFF"),
        encode(Image.new("RGB", (4, 3)), "BMP"),
        b"",
    ],
)
def test_data_that_is_not_an_image_is_refused(body):
    assert_refused(
        lambda _: web.Response(body=body, content_type="image/png"), "media_format", "known format|empty"
    )
    assert_url_refused(data_url(body), "media_format", "known format|empty")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_images_are_refused(kind):
    whole = encode(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    assert_refused(lambda _: web.Response(body=whole[: len(whole) // 2]), "media_format", "cannot be decoded")
