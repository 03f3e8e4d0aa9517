"""URLs that are refused before anything is sent."""

import base64

import pytest
from aiohttp import web
from PIL import Image

from tests.serve.media.site import PNG, RED, assert_refused, assert_url_refused, data_url, encode, fetch_url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "has the scheme"),
        ("cat.png", "has the scheme"),
        ("file:///etc/passwd", "has the scheme"),
        ("ftp://images.test/", "has the scheme"),
        ("http:///cat.png", "not a valid URL"),
        ("http://[::1/", "not a valid URL"),
        ("http://images.test:99999/", "not a valid URL"),
        ("http://images.test:0/", "has the invalid port 0"),
        ("https://me:secret@images.test/", "user names and passwords"),
        ("https://me@images.test/", "user names and passwords"),
        ("https://me:secret@images.test:99999/", "not a valid URL"),
        ("https://images.test/" + "x" * 9000, "characters; at most 8,192"),
    ],
)
def test_malformed_urls_are_refused(url, message):
    assert "secret" not in assert_url_refused(url, "media_url_invalid", message, allowed_hosts=["*"])


@pytest.mark.parametrize(
    "host",
    ["a..test", "x" * 64 + ".test", "x." * 127 + "test", "a b.test", "\ud800.test", "a\x00b.test", "."],
)
def test_impossible_hosts_are_refused(host):
    assert_url_refused(f"http://{host}/", "media_url_invalid", allowed_hosts=["*"])


def test_messages_show_neither_path_nor_query():
    message = assert_refused(
        lambda _: web.Response(status=404), "media_unreachable", "status 404", path="/hidden?token=hidden"
    )
    assert "hidden" not in message
    assert "images.test" in message


TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:image;base64,{TEXT}",
        f"data:image/*;base64,{TEXT}",
        f"data:image/jpg;base64,{TEXT}",
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"data:image/png;name=a.png;base64,{TEXT}",
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + "\r\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)),
        "data:image/png;base64,\n " + "\t".join(TEXT) + " \n",
    ],
    ids=["plain", "image", "any image", "jpg", "capitals", "parameter", "MIME", "CRLF", "spaces"],
)
def test_data_urls_of_real_clients_are_read(url):
    assert fetch_url(url, max_bytes=len(PNG)).size == (4, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_image_with_a_broken_exif_block_is_read():
    for exif in (b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00not a header"):
        data = encode(Image.new("RGB", (4, 3), RED), "JPEG", exif=exif)
        assert fetch_url(data_url(data, "image/jpeg")).size == (4, 3)


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("data:", "media_url_invalid", "write data:image/png;base64"),
        ("data:image/png,abc", "media_url_invalid", "write data:image/png;base64"),
        ("data:image/png;base64,%%%%", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,QUJDR", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,QUJ\u00e9", "media_url_invalid", "not valid base64"),
        ("data:image/png;base64,", "media_format", "is empty"),
        ("data:text/html;base64,QUJD", "media_format", "its type is 'text/html'"),
        ("data:image/svg+xml;base64,QUJD", "media_format", "its type is 'image/svg"),
        ("data:;base64,QUJD", "media_format", "its type is ''"),
    ],
)
def test_malformed_data_urls_are_refused(url, code, message):
    assert_url_refused(url, code, message)
