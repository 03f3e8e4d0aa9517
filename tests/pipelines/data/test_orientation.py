"""Images with damaged EXIF blocks are shown, upright if the orientation can be read."""

import io
import struct
import zlib

import pytest
from PIL import Image

from pipelines.data.images import decode, size_of
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage

SIZE = (12, 8)
STORED, TURNED = SIZE, SIZE[::-1]


def tiff(*entries, order="<", count=None):
    """A TIFF header with one directory; each entry is (tag, kind, count, value)."""
    head = b"II*\x00" if order == "<" else b"MM\x00*"
    body = b"".join(
        struct.pack(f"{order}HHL", tag, kind, n)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}L", value))
        for tag, kind, n, value in entries
    )
    return head + struct.pack(f"{order}LH", 8, len(entries) if count is None else count) + body + bytes(4)


TURN = (0x0112, 3, 1, 6)
FAR = (0x010F, 2, 500, 90_000)
"""A text that lies after the end of the block."""

BLOCKS = {
    "sound": (b"Exif\0\0" + tiff(TURN), TURNED),
    "sound, big-endian": (b"Exif\0\0" + tiff(TURN, order=">"), TURNED),
    "no Exif prefix": (tiff(TURN), TURNED),
    "two prefixes": (b"Exif\0\0" * 2 + tiff(TURN), TURNED),
    "orientation as a long number": (b"Exif\0\0" + tiff((0x0112, 4, 1, 6)), TURNED),
    "no TIFF header": (b"Exif\0\0" + b"nothing of the kind", STORED),
    "only the prefix": (b"Exif\0\0", STORED),
    "half a header": (b"Exif\0\0II*\0", STORED),
    "zeros": (b"Exif\0\0" + bytes(40), STORED),
    "directory after the end": (b"Exif\0\0II*\0" + struct.pack("<L", 5000), STORED),
    "cut off after the orientation": (b"Exif\0\0" + tiff(TURN, FAR)[:30], TURNED),
    "cut off before the orientation": (b"Exif\0\0" + tiff(FAR, TURN)[:20], STORED),
    "a text after the end": (b"Exif\0\0" + tiff(FAR, TURN), TURNED),
    "too many entries": (b"Exif\0\0" + tiff(TURN, count=40_000), TURNED),
    "unknown kinds of values": (b"Exif\0\0" + tiff((0x0110, 99, 1, 1), TURN), TURNED),
    "orientation 0": (b"Exif\0\0" + tiff((0x0112, 3, 1, 0)), STORED),
    "orientation 77": (b"Exif\0\0" + tiff((0x0112, 3, 1, 77)), STORED),
    "orientation as text": (b"Exif\0\0" + tiff((0x0112, 2, 2, 54)), STORED),
    "directory that points to itself": (b"Exif\0\0" + tiff(TURN, (0x8769, 4, 1, 8)), TURNED),
}


def jpeg(block):
    data = plain("JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(block, name=b"eXIf"):
    data = plain("PNG")
    return data[:33] + chunk(name, block.removeprefix(b"Exif\0\0") if name == b"eXIf" else block) + data[33:]


def webp(block):
    flags = struct.pack("<B3x", 8) + struct.pack("<L", SIZE[0] - 1)[:3] + struct.pack("<L", SIZE[1] - 1)[:3]
    chunks = [(b"VP8X", flags), (b"VP8 ", plain("WEBP")[20:]), (b"EXIF", block)]
    body = b"".join(n + struct.pack("<L", len(d)) + d + bytes(len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<L", len(body) + 4) + b"WEBP" + body


def plain(kind):
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


def raw_profile(text, name=b"exif"):
    return png(b"Raw profile type " + name + b"\0\0" + zlib.compress(text), b"zTXt")


def profile(block, length=None):
    digits = block.hex() if isinstance(block, bytes) else block
    return f"\nexif\n{len(block) if length is None else length:>8}\n{digits}\n".encode()


SOUND = b"Exif\0\0" + tiff(TURN)
RAW_PROFILES = {
    "sound": (raw_profile(profile(SOUND)), TURNED),
    "sound, in two lines": (raw_profile(profile(SOUND.hex()[:20] + "\n" + SOUND.hex()[20:])), TURNED),
    "APP1": (raw_profile(profile(SOUND), b"APP1"), TURNED),
    "not hexadecimal": (raw_profile(profile("this is no hex")), STORED),
    "hexadecimal, then something else": (raw_profile(profile(SOUND.hex() + "zz")), TURNED),
    "an odd number of digits": (raw_profile(profile(SOUND.hex()[:-1])), TURNED),
    "empty": (raw_profile(b""), STORED),
    "no head": (raw_profile(SOUND.hex().encode()), STORED),
    "cut off": (raw_profile(profile(SOUND.hex()[:60])), TURNED),
}

FILES = [
    pytest.param(make(block), size, id=f"{make.__name__}: {name}")
    for make in (jpeg, png, webp)
    for name, (block, size) in BLOCKS.items()
    if not (make is jpeg and name == "no Exif prefix")  # such a block of a JPEG is no EXIF block
] + [pytest.param(data, size, id=f"PNG raw profile: {name}") for name, (data, size) in RAW_PROFILES.items()]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("data", "size"), FILES)
def test_an_image_is_upright_if_its_orientation_can_be_read(data, size):
    """The endpoint opens the same file in the same way."""
    image = decode(io.BytesIO(data), "test")
    assert (image.mode, image.size) == ("RGB", size)
    assert size_of(io.BytesIO(data), "test") == STORED
    assert EncodedImage.read(data, "test", MediaConfig()).open().size == size


@pytest.mark.parametrize("value", range(1, 9))
def test_each_orientation_is_undone_as_pillow_does_it(value):
    from PIL import ImageOps

    image = Image.new("RGB", (3, 2))
    image.putdata([(40 * number, 0, 0) for number in range(6)])
    exif = Image.Exif()
    exif[0x0112] = value
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]:
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif, **options)
        expected = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
        found = decode(buffer, "test")
        assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())


def test_an_orientation_in_xmp_is_used():
    buffer = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", SIZE).save(buffer, "JPEG", xmp=xmp)
    assert decode(buffer, "test").size == TURNED


def test_damage_to_the_pixels_is_still_an_error():
    from pipelines.data.images import ImageError

    with pytest.raises(ImageError, match=r"is a JPEG that is cut off"):
        decode(io.BytesIO(jpeg(BLOCKS["no TIFF header"][0])[:-40]), "test")
