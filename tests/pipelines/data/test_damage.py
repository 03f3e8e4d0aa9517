"""PNG and JPEG files with broken metadata are read; broken pixels are named."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.data.images import ImageError, decode, size_of
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage

SIZE = (12, 8)
EXIF = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def chunk(name, data, checksum=None):
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def plain(kind, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, SIZE, 200 if mode == "L" else (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def png(*chunks, mode="RGB"):
    data = plain("PNG", mode)
    return data[:33] + b"".join(chunks) + data[33:]


def jpeg(marker, content):
    data = plain("JPEG")
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


BOMB = zlib.compress(bytes(2**24), 9)
SOUND = {
    **{
        f"{name} with a wrong checksum": png(chunk(name.encode(), content, 1))
        for name, content in {
            "tEXt": b"key\0value",
            "zTXt": b"key\0\0" + zlib.compress(b"x"),
            "iTXt": b"key\0\0\0\0\0value",
            "eXIf": b"",
            "pHYs": bytes(9),
            "gAMA": bytes(4),
            "tIME": bytes(7),
            "iCCP": b"icc\0\0" + zlib.compress(b"x"),
            "prVt": b"private",
        }.items()
    },
    **{
        f"short {name}": png(chunk(name.encode(), bytes(length)))
        for name, length in {
            "pHYs": 1,
            "gAMA": 1,
            "cHRM": 2,
            "sRGB": 0,
            "tRNS": 1,
            "acTL": 1,
            "fcTL": 1,
            "fdAT": 1,
            "iCCP": 1,
            "zTXt": 0,
            "iTXt": 0,
            "eXIf": 0,
        }.items()
    },
    "a profile in an unknown compression": png(chunk(b"iCCP", b"x\0\7")),
    "a compressed text in an unknown compression": png(chunk(b"zTXt", b"x\0\7")),
    "a text that is a bomb": png(chunk(b"zTXt", b"x\0\0" + BOMB)),
    "a profile that is a bomb": png(chunk(b"iCCP", b"x\0\0" + BOMB)),
    "grey with a short tRNS": png(chunk(b"tRNS", b"\0"), mode="L"),
    "no frames": png(chunk(b"acTL", bytes(8))),
    "a wrong frame": png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", bytes(26))),
    "metadata after the pixels": plain("PNG")[:-12] + chunk(b"tEXt", b"k\0v", 1) + chunk(b"IEND", b""),
    "several": png(chunk(b"gAMA", b"\0"), chunk(b"pHYs", b""), chunk(b"tEXt", b"k\0v", 1)),
    **{
        f"JPEG: {name}": jpeg(marker, content)
        for name, (marker, content) in {
            "short ICC_PROFILE": (0xE2, b"ICC_PROFILE\0"),
            "wrong ICC_PROFILE": (0xE2, b"ICC_PROFILE\0\1\2abc"),
            "short JFIF": (0xE0, b"JFIF\0"),
            "short Adobe": (0xEE, b"Adobe"),
            "short MPF": (0xE2, b"MPF\0"),
            "wrong MPF": (0xE2, b"MPF\0garbage!"),
            "Photoshop": (0xED, b"Photoshop 3.0\x008BIM\4"),
            "short Photoshop resource": (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x02ab"),
            "XMP": (0xE1, b'http://ns.adobe.com/xap/1.0/\0<no xml tiff:Orientation="up'),
            "short FlashPix": (0xE2, b"FPXR\0"),
            "comment": (0xFE, b"\xff\xfe"),
        }.items()
    },
}


@pytest.mark.parametrize("name", SOUND)
def test_broken_metadata_do_not_matter(name):
    data = SOUND[name]
    assert size_of(io.BytesIO(data), "x") == SIZE
    for image in (decode(io.BytesIO(data), "x"), EncodedImage.read(data, "x", MediaConfig()).open()):
        assert (image.mode, image.size) == ("RGB", SIZE)
        assert np.abs(np.asarray(image, int) - (200, 30, 30)).max() < 8 or "grey" in name


def test_the_orientation_is_kept_when_other_metadata_are_broken():
    data = png(chunk(b"eXIf", EXIF, 1), chunk(b"gAMA", b"\0"))
    assert decode(io.BytesIO(data), "x").size == SIZE[::-1]
    exif = b"Exif\0\0" + EXIF
    sound = jpeg(0xE1, exif)
    broken = sound[:2] + b"\xff\xe2" + struct.pack(">H", 14) + b"ICC_PROFILE\0" + sound[2:]
    assert decode(io.BytesIO(broken), "x").size == SIZE[::-1]


def test_transparency_is_kept_when_other_metadata_are_broken():
    transparent = chunk(b"tRNS", struct.pack(">HHH", 200, 30, 30))
    for extra in (b"", chunk(b"pHYs", b"\0")):
        assert decode(io.BytesIO(png(transparent, extra)), "x").getpixel((0, 0)) == (255, 255, 255)


def changed(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


PNG = plain("PNG")
IDAT = PNG.index(b"IDAT")
DAMAGED = {
    "IDAT": (changed(PNG, IDAT + 8), "is a PNG whose IDAT chunk is damaged"),
    "IHDR": (changed(PNG, 20), "is a PNG whose IHDR chunk is damaged"),
    "cut off in the pixels": (PNG[: IDAT + 9], "is a PNG that is cut off in its IDAT chunk"),
    "cut off after the header": (PNG[:33], "is a PNG that is cut off"),
    "only the signature": (PNG[:8], "is a PNG that is cut off"),
    "pixels and metadata": (
        changed(png(chunk(b"gAMA", b"\0")), IDAT + 13 + 8),
        "is a PNG whose IDAT chunk is damaged",
    ),
    "zeros after the header": (PNG[:33] + bytes(40), "has no chunk where one must begin"),
    "a JPEG's signature": (
        b"\xff\xd8\xff\xe0" + bytes(40) + b"\xff\xd9",
        "is a JPEG whose header is damaged",
    ),
    "half a JPEG": (plain("JPEG")[:-60], "cannot be decoded: it is a JPEG that is cut off"),
    "a GIF's signature": (b"GIF89a", "is a GIF whose header is damaged"),
    "text": (b"<html>", "has no known format"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_broken_pixels_are_named(name):
    data, reason = DAMAGED[name]
    with pytest.raises(ImageError, match=reason):
        decode(io.BytesIO(data), "x")


def test_the_format_of_a_refused_kind_is_not_read():
    with pytest.raises(ImageError, match="has no known format"):
        decode(io.BytesIO(png(chunk(b"gAMA", b"\0"))), "x", formats=("JPEG",))


def test_a_repair_keeps_the_limits():
    big = io.BytesIO()
    Image.new("L", (300, 300)).save(big, "PNG")
    data = big.getvalue()
    data = data[:33] + chunk(b"gAMA", b"\0") + data[33:]
    with pytest.raises(ImageError, match="300 × 300 pixels"):
        decode(io.BytesIO(data), "x", max_pixels=80_000)
    tracemalloc.start()
    decode(io.BytesIO(SOUND["a profile that is a bomb"]), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
