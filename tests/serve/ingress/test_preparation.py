"""The work that an ingress does for a request before an engine sees it."""

import asyncio
import time

import pytest
from aiohttp import web
from PIL import Image

import serve.media.images
from serve.chat.schemas import ChatRequest
from serve.config import LimitSection, ServeConfig
from serve.ingress.ingress import Ingress
from serve.ingress.preparation import Preparer
from serve.problem import Problem
from tests.serve.media.site import PNG, data_url, fetcher, serving


def test_one_bad_image_cancels_the_other_downloads_and_names_its_field():
    reached, over = asyncio.Event(), asyncio.Event()

    async def answer(request):
        if request.path == "/bad":
            await reached.wait()
        else:
            reached.set()
            await over.wait()
        return web.Response(status=404)

    async def run():
        async with serving(answer) as site, fetcher(site) as media:
            urls = {name: f"http://images.test:{site.port}/{name}" for name in ("slow", "bad")}
            with pytest.raises(Problem, match="status 404") as caught:
                await Preparer(LimitSection(), media).fetch(urls)
            assert caught.value.param == "bad"
            assert not [task for task in asyncio.all_tasks() if "fetch" in str(task.get_coro())]
            over.set()

    asyncio.run(run())


def test_no_more_requests_decode_images_at_once_than_there_are_threads(tiny_model, monkeypatch):
    now, highest = 0, 0

    def open_slowly(image):
        nonlocal now, highest
        now += 1
        highest = max(highest, now)
        time.sleep(0.05)
        now -= 1
        return Image.new("RGB", image.size)

    async def run():
        config = ServeConfig(model=str(tiny_model), limits={"prepare_threads": 1})
        ingress = Ingress(config, NoEngine())
        monkeypatch.setattr(serve.media.images.EncodedImage, "open", open_slowly)
        part = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
        body = ChatRequest(model="x", messages=[{"role": "user", "content": [part, part]}])
        target = ingress.catalogue.target(tiny_model.name)
        with ingress.journeys.begin("x", time.monotonic(), None) as journey:
            requests = [ingress.preparer.request(body, target, journey) for _ in range(3)]
            await asyncio.gather(*requests)

    asyncio.run(run())
    assert highest == 1


class NoEngine:
    """In place of a deployment handle that no test calls."""

    def options(self, **_):
        return self
