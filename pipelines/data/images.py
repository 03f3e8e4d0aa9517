"""References to images: they name the position of the bytes and decode them when a row is used.

Decoding gives the first frame, upright by its EXIF orientation, as RGB with transparency on white.
Sixteen-bit greyscale is scaled to eight bits. Only the formats in `FORMATS` are tried: other decoders may
run external programs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, ClassVar, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.data.damage import damage_of, kind_of, without_metadata
from pipelines.data.encoded import decode_base64, is_data_url, split_data_url
from pipelines.data.parquet_cells import read_cell
from pipelines.data.rows import RejectKind
from pipelines.data.storage import (
    RefusedError,
    UnreachableError,
    check_file,
    failure_of,
    open_file,
    open_image_file,
    read_file,
)
from skipvision.errors import DataError
from skipvision.files import NotAFileError
from skipvision.orientation import upright

T = TypeVar("T")

# They are about metadata of images that are read, and do not name the image.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
"""Max width × height; images above it are rejected before decoding."""

MAX_ASPECT = 100
"""Max ratio of the sides; a processor that scales the shorter side could fill the memory."""


class ImageError(DataError):
    """An unusable image. ``kind`` is the kind of reject that it is counted under."""

    kind: ClassVar[RejectKind] = "unreadable image"


class MissingImageError(ImageError):
    """The image does not exist."""

    kind = "missing image"


class RefusedImageError(ImageError):
    """The image exists, but the storage or the server denies access to it."""

    kind = "refused image"


class UnreachableImageError(ImageError):
    """The storage or the server of the image failed for now; a later try may succeed."""

    kind = "unreachable image"


class OversizedImageError(ImageError):
    """The image has too many pixels, by mistake or as a decompression bomb."""

    kind = "oversized image"


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file: an absolute local path or any fsspec URL."""

    path: str
    max_pixels: int = MAX_PIXELS

    def open(self) -> Image.Image:
        with _errors_of_storage(self), open_image_file(self.path) as file:
            return decode(file, self.path, self.max_pixels)

    def read(self) -> bytes:
        with _errors_of_storage(self):
            return read_file(self.path)

    def check_exists(self) -> None:
        """Raise `ImageError` if the file does not exist or access is denied; cheaper than `open`."""
        with _errors_of_storage(self):
            check_file(self.path)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image whose encoded bytes are in the row itself, for example as a data URL.

    ``name`` (``"#1 of row a"``) replaces a path in messages.
    """

    data: bytes = field(repr=False)
    name: str
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_base64(cls, text: str, name: str, max_pixels: int = MAX_PIXELS) -> InlineImage:
        """Decode base64, with or without the prefix ``data:image/…;base64,``, which may have line breaks."""
        if is_data_url(text):
            head = text.partition(",")[0]
            _, parameters, text = split_data_url(text)
            if parameters[-1:] != ["base64"]:
                raise ImageError(f"image {name} is a data URL that is not base64: {head[:60]!r}")
        try:
            return cls(decode_base64(text), name, max_pixels)
        except ValueError as error:
            raise ImageError(f"image {name} is not valid base64: {error}") from None

    def open(self) -> Image.Image:
        return decode(io.BytesIO(self.data), self.name, self.max_pixels)

    def read(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """Image ``index`` in a cell of a parquet or Arrow file; a cell has one image or a list.

    In an Arrow file, ``row_group`` is the number of the record batch.

    Shuffled reading is fast if row groups are small (`read_cell`), such as the 100 rows that Hugging Face
    datasets writes.
    """

    path: str
    row_group: int
    row: int
    column: str
    index: int
    max_pixels: int = MAX_PIXELS

    def open(self) -> Image.Image:
        return decode(io.BytesIO(self.read()), str(self), self.max_pixels)

    def read(self) -> bytes:
        with _errors_of_storage(self):
            cell = read_cell(self.path, self.row_group, self.column, self.row)
        value = cell[self.index] if isinstance(cell, list) else cell
        data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise MissingImageError(f"image {self} is null")
        return data

    def __str__(self) -> str:
        return f"{self.path}[row group {self.row_group}, row {self.row}].{self.column}[{self.index}]"


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image file in an uncompressed tar: ``size`` bytes from ``offset``."""

    path: str
    member: str
    offset: int
    size: int
    max_pixels: int = MAX_PIXELS

    def open(self) -> Image.Image:
        return decode(io.BytesIO(self.read()), str(self), self.max_pixels)

    def read(self) -> bytes:
        return _part(self)

    def __str__(self) -> str:
        return f"{self.path}[{self.member}]"


_JSON_ESCAPES = {"\\n": "", "\\r": "", "\\t": "", "\\/": "/"}


@dataclass(frozen=True, slots=True)
class TsvImage:
    """A base64 image in a table: ``size`` bytes from ``offset``. ``name`` names it in messages."""

    path: str
    name: str
    offset: int
    size: int
    max_pixels: int = MAX_PIXELS

    def open(self) -> Image.Image:
        return decode(io.BytesIO(self.read()), str(self), self.max_pixels)

    def read(self) -> bytes:
        text = _part(self).decode("ascii", "replace")
        for escape, plain in _JSON_ESCAPES.items():  # a cell may be a JSON list
            text = text.replace(escape, plain)
        return InlineImage.from_base64(text, str(self)).data

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"


def _part(image: TarImage | TsvImage) -> bytes:
    """Read the image's bytes: ``size`` from ``offset``."""
    with _errors_of_storage(image), open_file(image.path) as file:
        file.seek(image.offset)
        part: bytes = file.read(image.size)
    return part


@contextmanager
def _errors_of_storage(image: object) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except NotAFileError as error:
        raise ImageError(f"image {image} cannot be read: {error.strerror}") from None
    except Exception as error:  # storage back ends raise errors of many types
        failure = failure_of(error)
        if isinstance(failure, FileNotFoundError):
            raise MissingImageError(f"image {image} does not exist") from None
        if isinstance(failure, RefusedError):
            raise RefusedImageError(f"image {image} cannot be accessed: {failure}") from None
        if isinstance(failure, UnreachableError):
            raise UnreachableImageError(f"image {image} cannot be reached: {failure}") from None
        raise ImageError(f"image {image} cannot be read: {type(error).__name__}: {error}") from error


# ----------------------------------------------------------------------------------------- decoding


def decode(
    file: IO[bytes], name: str, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Return the image as upright RGB. Raise `ImageError` for any bytes that cannot be decoded."""
    return _read_image(file, name, max_pixels, formats, _pixels)


def size_of(
    file: IO[bytes], name: str, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """Return width and height (pixels) from the header, without decoding. Raise `ImageError` as `decode`."""
    return _read_image(file, name, max_pixels, formats, lambda image: image.size)


def _pixels(image: Image.Image) -> Image.Image:
    image.load()
    return to_rgb(upright(image))


def _read_image(
    file: IO[bytes], name: str, max_pixels: int, formats: Sequence[str], read: Callable[[Image.Image], T]
) -> T:
    """Open an image and return what ``read`` makes of it; without its metadata if these are broken.

    Raises:
        ImageError: the image is too large, or not even its pixels can be read.
    """
    try:
        return _opened(file, name, max_pixels, formats, read)
    except OversizedImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            f"image {name} cannot be decoded: there is not enough memory for its pixels"
        ) from error
    except Exception as error:  # decoders raise errors of many types on corrupt bytes
        file.seek(0)
        data = file.read()
        kind = kind_of(data)
        cleaned = without_metadata(data) if kind in formats else None
        if cleaned is not None and cleaned != data:
            try:
                return _opened(io.BytesIO(cleaned), name, max_pixels, formats, read)
            except OversizedImageError:
                raise
            except Exception as other:  # the first error is about the whole file
                error.add_note(f"without its metadata: {other}")
        raise ImageError(f"image {name} {_fault(data, kind, formats, error)}") from error


def _fault(data: bytes, kind: str | None, formats: Sequence[str], error: Exception) -> str:
    """Return the end of the message about an image that cannot be read."""
    if not data:
        return "is empty"
    if kind in formats and (found := damage_of(data)):
        return f"cannot be decoded: it {found}"
    if not isinstance(error, UnidentifiedImageError):
        return f"cannot be decoded: {error}"
    if kind in formats:
        return f"cannot be decoded: it is a {kind} whose header is damaged"
    return f"has no known format ({', '.join(formats)})"


def _opened(
    file: IO[bytes], name: str, max_pixels: int, formats: Sequence[str], read: Callable[[Image.Image], T]
) -> T:
    """Open an image, check its size by its header, and return what ``read`` makes of it."""
    try:
        with Image.open(file, formats=tuple(formats)) as image:
            if image.width * image.height > max_pixels:
                raise OversizedImageError(
                    f"image {name} has {image.width} × {image.height} pixels, more than {max_pixels:,}"
                )
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise OversizedImageError(
                    f"image {name} has {image.width} × {image.height} pixels: one side is more than "
                    f"{MAX_ASPECT} times the other; scaled by its shorter side it would not fit into memory"
                )
            return read(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OversizedImageError(f"image {name} is too large: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency on white, sixteen bits scaled to eight."""
    if image.mode.startswith("I"):  # Pillow would clip at 255
        eight_bit = np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8
        return Image.fromarray(eight_bit.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
