"""Every image is decoded to upright RGB, or raises an error with its name and the reason."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.data.images import FileImage, ImageError, InlineImage, OversizedImageError, decode
from skipvision.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind="PNG", **options):
    result = decode(io.BytesIO(saved(image, kind, **options)), "test")
    assert result.mode == "RGB"
    return result


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = decoded(Image.new("RGB", (4, 3), "white").convert(mode), kind)
    assert image.size == (4, 3)
    assert min(image.getpixel((1, 1))) >= 253


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_common_format_is_decoded(kind):
    np.testing.assert_allclose(decoded(Image.new("RGB", (4, 3), RED), kind).getpixel((1, 1)), RED, atol=4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    grey = Image.fromarray(np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert [pixel[0] for pixel in np.asarray(decoded(grey, kind))[0]] == [0, 0x12, 0x80, 0xFF]


def test_floating_point_pixels_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        decoded(Image.new("F", (2, 2)), "TIFF")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    np.testing.assert_array_equal(np.asarray(decoded(image.convert(mode))), [[[255] * 3, [0] * 3]])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_orientation_is_applied(mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90°
    assert decoded(Image.new(mode, (4, 2)), "JPEG", exif=exif).size == (2, 4)


def test_only_the_first_frame_of_an_animation_is_used():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    assert decoded(frames[0], "GIF", save_all=True, append_images=frames[1:]).getpixel((0, 0)) == RED


# ------------------------------------------------------------------------------------ broken images


def huge_png():
    """A valid header that promises 50,000 × 50,000 pixels, in a file of some eighty bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def noise(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind)


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 20]) + data[middle + 20 :]


@pytest.mark.parametrize(
    ("name", "data", "kind", "reason"),
    [
        ("empty.png", b"", "unreadable image", "is empty"),
        ("page.jpg", b"<html>Not found</html>", "unreadable image", "has no known format (JPEG, PNG"),
        (
            "drawing.eps",
            saved(Image.new("RGB", (9, 9)), "EPS"),
            "unreadable image",
            "has no known format",
        ),
        ("cut.jpg", noise("JPEG")[:-2000], "unreadable image", "is a JPEG that is cut off"),
        ("cut.png", noise("PNG")[:-2000], "unreadable image", "is a PNG that is cut off in its IDAT chunk"),
        ("cut.webp", noise("WEBP")[:-1000], "unreadable image", "cannot be decoded"),
        ("flipped.png", flipped(noise("PNG")), "unreadable image", "cannot be decoded"),
        ("bomb.png", huge_png(), "oversized image", "pixels"),
        (
            "large.png",
            saved(Image.new("L", (101, 100))),
            "oversized image",
            "101 × 100 pixels, more than 10,000",
        ),
    ],
)
def test_broken_images_raise_errors_with_the_reason(tmp_path, name, data, kind, reason):
    (tmp_path / name).write_bytes(data)
    for image in (FileImage(str(tmp_path / name), 10_000), InlineImage(data, name, 10_000)):
        with pytest.raises(DataError) as caught:
            image.open()
        assert caught.value.kind == kind
        assert reason in str(caught.value)
        assert name in str(caught.value)


def test_the_pixel_limit_is_exact():
    data = saved(Image.new("L", (100, 100)))
    assert InlineImage(data, "fits", 10_000).open().size == (100, 100)


def test_paths_without_an_image_file(tmp_path):
    for image, kind in [("gone.png", "missing image"), (".", "unreadable image")]:
        with pytest.raises(ImageError) as caught:
            FileImage(str(tmp_path / image)).open()
        assert caught.value.kind == kind


def test_errors_of_images_survive_pickling():
    with pytest.raises(ImageError) as caught:
        InlineImage(b"", "nothing").open()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.kind) == (ImageError, "image nothing is empty", "unreadable image")


def test_a_thin_image_is_rejected():
    """Its pixels are few, but scaled to a shorter side of 224 it would take gigabytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(buffer, "PNG")
    with pytest.raises(OversizedImageError, match="one side is more than 100 times the other"):
        decode(io.BytesIO(buffer.getvalue()), "thin.png")
    assert decode(_png(Image.new("RGB", (1, 100))), "narrow.png").size == (1, 100)


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    buffer.seek(0)
    return buffer


def test_an_image_that_does_not_fit_into_memory_is_an_error_of_its_row(monkeypatch, tmp_path):
    def fail(image):
        raise MemoryError

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("pipelines.data.images._pixels", fail)
    with pytest.raises(ImageError, match=r"a.png cannot be decoded: there is not enough memory"):
        FileImage(str(tmp_path / "a.png")).open()
