"""Images built to crash, to fill the memory or to take for ever end as an answer or as an error of ours."""

from __future__ import annotations

import base64
import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

import skipvision as sv
from pipelines.data.images import MAX_ASPECT, ImageError, InlineImage
from serve.errors import MediaError
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage
from skipvision.engine import prepare
from skipvision.errors import InputError
from skipvision.loading import load_model, load_processor
from skipvision.testing.families import FAMILIES

MIB = 2**20


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def job_way(data: bytes) -> Image.Image:
    return InlineImage(data, "x").open()


def endpoint_way(data: bytes) -> Image.Image:
    return EncodedImage.read(data, "x", MediaConfig()).open()


def data_url_way(data: bytes) -> Image.Image:
    text = base64.b64encode(data).decode()
    return EncodedImage.from_data_url(f"data:image/png;base64,{text}", MediaConfig()).open()


WAYS = [job_way, endpoint_way]

# --------------------------------------------------------------------------- extreme shapes (CVE-2026-22773)

SIDES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 7),
    (3, 3),
    (1, MAX_ASPECT),
    (MAX_ASPECT, 1),
    (8, 800),
    (800, 8),
    (15, 1500),
]
BEYOND = [(1, MAX_ASPECT + 1), (MAX_ASPECT + 1, 1), (1, 65_000), (65_000, 1)]
SAMPLE = ("llava", "qwen2_vl", "llava_next", "gemma3")


@pytest.mark.parametrize("size", BEYOND)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_beyond_the_ratio_is_refused(way, size):
    with pytest.raises((ImageError, MediaError), match=f"more than {MAX_ASPECT} times the other"):
        way(encoded(Image.new("RGB", size)))


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_within_the_ratio_is_decoded(way, size):
    assert way(encoded(Image.new("RGB", size))).size == size


class OnlyImages:
    """A processor that prepares images as its family does, and has one token for text."""

    def __init__(self, family: str) -> None:
        names = IMAGE_PROCESSOR_MAPPING_NAMES.get(family, {})
        self.images = getattr(transformers, names.get("pil") or names.get("torchvision") or "none", None)
        if self.images is None:
            pytest.skip(f"{family} has no image processor of its own")
        try:
            self.images = self.images()
        except ImportError:
            pytest.skip(f"the images of {family} need torchvision")

    def __call__(self, text, images, return_tensors):
        return {"input_ids": torch.tensor([[1]]), **self.images(images, return_tensors=return_tensors)}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in FAMILIES]
)
def test_extreme_shapes_end_as_pixels_or_as_an_input_error(family):
    processor = OnlyImages(family)
    outcomes = {}
    for size in SIDES:
        request = sv.Request("x", [Image.new("RGB", size, "red")])
        try:
            inputs = prepare(processor, request).inputs
        except InputError as error:
            outcomes[size] = str(error)
        else:
            values = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
            outcomes[size] = sum(value.numel() * value.element_size() for value in values)
            assert outcomes[size] < 500 * MIB, size
    assert any(isinstance(outcome, int) for outcome in outcomes.values()), outcomes


def test_the_engine_answers_about_images_of_extreme_shapes(tiny_model):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    requests = [
        sv.Request(chat, [Image.new("RGB", size)], sampling=sv.Sampling(max_new_tokens=2), key=size)
        for size in SIDES
    ]
    config = sv.SkipConfig(retained=4, skipped=6)
    with sv.Engine(load_model(tiny_model), load_processor(tiny_model), config, max_sequences=2) as engine:
        answers = {answer.key: answer for answer in engine.run(requests)}
    assert answers.keys() == set(SIDES)
    assert [answer.error for answer in answers.values() if answer.error is not None] == []


# ----------------------------------------------------------------------------------- bombs (CVE-2026-5497)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    """A sound PNG with further chunks after its header."""
    sound = encoded(Image.new("RGB", size))
    return sound[:33] + b"".join(chunks) + sound[33:]


def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9)
    zeros = bytes(MIB)
    return b"".join(packer.compress(zeros) for _ in range(size // MIB)) + packer.flush()


BIG = deflated(256 * MIB)  # 256 KiB


def frames(kind: str, count: int) -> bytes:
    images = [Image.fromarray(np.full((4, 4, 3), number % 256, np.uint8)) for number in range(count)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


def huge_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", BIG) + chunk(b"IEND", b"")


BOMBS = {
    "zTXt": lambda: png_with(chunk(b"zTXt", b"key\0\0" + BIG)),
    "many zTXt": lambda: png_with(*[chunk(b"zTXt", b"key%d\0\0" % n + deflated(MIB)) for n in range(200)]),
    "iTXt": lambda: png_with(chunk(b"iTXt", b"key\0\1\0\0\0" + BIG)),
    "iCCP": lambda: png_with(chunk(b"iCCP", b"icc\0\0" + BIG)),
    "many tEXt": lambda: png_with(*[chunk(b"tEXt", b"k%d\0v" % n) for n in range(20_000)]),
    "compressed EXIF text": lambda: png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + BIG)),
    "IDAT longer than its pixels": lambda: huge_header(8, 8),
    "a header of 4 billion pixels": lambda: huge_header(65_535, 65_535),
    "a header of 2 ** 62 pixels": lambda: huge_header(2**31 - 1, 2**31 - 1),
    "GIF of 3,000 frames": lambda: frames("GIF", 3000),
    "WebP of 1,000 frames": lambda: frames("WEBP", 1000),
    "PNG of 3,000 frames": lambda: frames("PNG", 3000),
    "TIFF of 2,000 pages": lambda: frames("TIFF", 2000),
    "TIFF whose pages are a ring": lambda: ring(),
    "nested chunks": lambda: png_with(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
}


def ring() -> bytes:
    """A TIFF whose first directory names itself as the next."""
    data = bytearray(encoded(Image.new("RGB", (4, 4)), "TIFF"))
    [start] = struct.unpack_from("<I", data, 4)
    [entries] = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * entries, start)
    return bytes(data)


@pytest.fixture(scope="module", params=BOMBS)
def bomb(request) -> bytes:
    return BOMBS[request.param]()


@pytest.mark.parametrize("way", WAYS)
def test_a_bomb_costs_neither_memory_nor_time(way, bomb):
    begin = time.process_time()
    tracemalloc.start()
    try:
        size = way(bomb).size
    except (ImageError, MediaError):
        size = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert size in (None, (8, 8), (4, 4))
    assert peak < 80 * MIB + len(bomb)
    assert time.process_time() - begin < 10


# ------------------------------------------------------- no addresses in messages (CVE-2026-22778)


def broken_files() -> dict[str, bytes]:
    found = {}
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        data = encoded(image, kind)
        found[f"{kind}, half"] = data[: len(data) // 2]
        found[f"{kind}, its first bytes"] = data[:20]
        for number in range(4):
            damaged = bytearray(data)
            for place in generator.integers(4, len(data), 8 * (number + 1)):
                damaged[place] = generator.integers(0, 255)
            found[f"{kind}, damage {number}"] = bytes(damaged)
    return {
        **found,
        "empty": b"",
        "text": b"hello",
        "SVG": b"<svg/>",
        "HTML": b"<html>",
        "zeros": bytes(1000),
    }


BROKEN = broken_files()


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("way", [*WAYS, data_url_way])
def test_the_message_of_a_broken_image_holds_no_address_of_memory(way, kind):
    message = ""
    try:
        way(BROKEN[kind])
    except (ImageError, MediaError) as error:
        message = str(error).replace("image/", "")
    assert not any(part in message for part in ("0x", "object at", "/"))
