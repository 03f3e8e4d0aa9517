"""Images from data URLs and from a real server: which are fetched, and how."""

import asyncio
import base64
import pickle
import threading

import pytest
from PIL import Image
from pydantic import ValidationError

import serve.media.images
from serve.errors import MediaError
from serve.media.config import MediaConfig
from skipvision.errors import InputError
from tests.serve.media.site import (
    PNG,
    RED,
    assert_refused,
    assert_url_refused,
    data_url,
    encode,
    fetch_from,
    fetch_url,
    fetcher,
    image_response,
    redirect,
    serving,
)


def test_an_image_from_an_allowed_host_is_fetched():
    image = fetch_from(image_response)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 3), RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_every_allowed_format_is_read_from_a_data_url(kind):
    url = data_url(encode(Image.new("RGB", (4, 3)), kind), f"image/{kind.lower()}")
    assert fetch_url(url).size == (4, 3)
    assert_url_refused(url, "media_format", formats=["PNG" if kind != "PNG" else "GIF"])


@pytest.mark.parametrize(
    "head", ["DATA:Image/PNG;BASE64", "data:image/png;charset=utf-8;base64", "data:image/jpg;base64"]
)
def test_data_urls_may_be_spelled_in_several_ways(head):
    assert fetch_url(f"{head},{base64.b64encode(PNG).decode()}").size == (4, 3)


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert fetch_url(data_url(encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif))).size == (2, 4)


def test_an_animation_becomes_its_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, "blue")]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert fetch_url(data_url(gif, "image/gif")).getpixel((0, 0)) == RED


def test_image_headers_are_read_outside_the_event_loop(monkeypatch):
    threads = []

    def size_of(*arguments):
        threads.append(threading.current_thread())
        return real(*arguments)

    real = serve.media.images.size_of
    monkeypatch.setattr(serve.media.images, "size_of", size_of)
    fetch_from(image_response)
    fetch_url(data_url(PNG))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_redirects_are_followed_under_the_same_rules():
    def answer(request):
        return image_response(request) if request.path == "/there" else redirect("/there")

    assert fetch_from(answer).size == (4, 3)
    assert_refused(answer, "media_unreachable", "redirects more than 0 times", max_redirects=0)


def test_requests_carry_no_cookies_and_accept_no_compression():
    async def run():
        def answer(request):
            response = image_response(request)
            response.set_cookie("who", "someone")
            return response

        async with serving(answer) as site, fetcher(site) as media:
            for _ in range(2):
                await media.fetch(f"http://images.test:{site.port}/image?a=1%262#part")
            return site.requests

    for request in asyncio.run(run()):
        assert request.headers["Accept-Encoding"] == "identity"
        assert request.raw_path == "/image?a=1%262"
        assert not {"Cookie", "Authorization", "Referer"} & set(request.headers)


def test_proxies_from_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch_from(image_response).size == (4, 3)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({"max_connections": 2}, 2), ({"max_connections_per_host": 1}, 1), ({}, 6)],
)
def test_concurrent_downloads_are_limited(settings, limit):
    async def run():
        at_once, highest = 0, 0

        async def answer(request):
            nonlocal at_once, highest
            at_once += 1
            highest = max(highest, at_once)
            await asyncio.sleep(0.05)
            at_once -= 1
            return image_response(request)

        async with serving(answer) as site, fetcher(site, **settings) as media:
            await asyncio.gather(*(media.fetch(f"http://a.test:{site.port}/{n}") for n in range(6)))
        return highest

    assert asyncio.run(run()) == limit


def test_settings_are_validated_and_described():
    for values in (
        {"allowed_hosts": ["https://a.test"]},
        {"max_bytes": 0},
        {"formats": ["TIFF"]},
        {"unknown": 1},
    ):
        with pytest.raises(ValidationError):
            MediaConfig(**values)
    assert all(field.description for field in MediaConfig.model_fields.values())
    assert "address_allowed" not in MediaConfig.model_fields


def test_errors_are_input_errors_and_survive_pickling():
    with pytest.raises(InputError) as caught:
        fetch_url("data:")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.code) == (MediaError, str(caught.value), "media_url_invalid")
