"""A URL that two parsers read differently never reaches the other host (CVE-2026-24779)."""

from __future__ import annotations

import asyncio

import pytest

from serve.errors import MediaError
from tests.serve.media.site import Names, fetcher, image_response, serving

URLS = (
    r"http://images.test\@evil.example:{port}/",
    r"http://images.test\.evil.example:{port}/",
    r"http://evil.example:{port}\@images.test/",
    r"http://evil.example\images.test:{port}/",
    r"http:\\evil.example:{port}\images.test",
    r"http:/\evil.example:{port}/images.test",
    "http://images.test@evil.example:{port}/",
    "http://images.test:{port}@evil.example:{port}/",
    "http://images.test:80@evil.example:{port}#@images.test/",
    "http://evil.example:{port}#@images.test/",
    "http://evil.example:{port}?@images.test/",
    "http://evil.example:{port}/@images.test/",
    "http://evil.example:{port};images.test/",
    "http://images.test%2eevil.example:{port}/",
    "http://images.test%00.evil.example:{port}/",
    "http://images.test%2f.evil.example:{port}/",
    "http://images.test%5c@evil.example:{port}/",
    "http://images.test\t.evil.example:{port}/",
    "http://images.test\n.evil.example:{port}/",
    "http://images.test\r\nHost: evil.example:{port}/",
    "http://images.test .evil.example:{port}/",
    "http://evil.example\u3002images.test.evil.example:{port}/",
    "http://images.test\uff0f.evil.example:{port}/",
    "http://images.test\uff20evil.example:{port}/",
    "http://images.test\u2488evil.example:{port}/",
    "http:///evil.example:{port}/",
    "http:evil.example:{port}/",
    "//evil.example:{port}/",
    "http://[images.test]@evil.example:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://images.test.evil.example:{port}/",
    "http://evilimages.test.example:{port}/",
    "hTTp://EVIL.example:{port}/",
    "file:///etc/passwd",
    "ftp://images.test:{port}/",
    "gopher://images.test:{port}/",
    "jar:http://images.test:{port}/!/",
    "unix://images.test/",
)


@pytest.mark.parametrize("url", URLS, ids=ascii)
def test_a_url_of_another_host_is_refused_without_a_query(url):
    async def run():
        names = Names()
        async with serving(image_response) as site:
            async with fetcher(site, names=names) as media:
                with pytest.raises(MediaError) as caught:
                    await media.fetch(url.format(port=site.port))
            return caught.value.code, names.queries, site.requests

    code, queries, requests = asyncio.run(run())
    assert code in ("media_url_invalid", "media_host_not_allowed")
    assert queries == requests == []


def test_the_allowed_host_is_fetched():
    async def run():
        async with serving(image_response) as site, fetcher(site) as media:
            return (await media.fetch(f"http://images.test:{site.port}/")).open().size

    assert asyncio.run(run()) == (4, 3)
