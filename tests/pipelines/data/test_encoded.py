"""Base64 is read as tools write it, with line breaks and in either alphabet: in rows, tables and requests."""

import base64
import io
import json
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.conversations import parse_image
from pipelines.data.encoded import decode_base64, is_image_base64
from pipelines.data.images import FORMATS, FileImage, ImageError, InlineImage
from pipelines.data.rows import BadRow
from pipelines.data.training_rows import read_training_rows
from pipelines.data.tsv_records import tsv_records
from serve.errors import MediaError
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage


def png():
    buffer = io.BytesIO()
    Image.effect_noise((20, 12), 80).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return data + bytes(2 - len(data) % 3)  # the base64 has padding


PNG = png()
TEXT = base64.b64encode(PNG).decode()
WRITTEN = {
    "one line": TEXT,
    "lines of 76, base64 -w76": "\n".join(textwrap.wrap(TEXT, 76)) + "\n",
    "lines of 76, MIME": base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
    "lines of 64, PEM": "\n".join(textwrap.wrap(TEXT, 64)),
    "indented": "\n    " + "\n    ".join(textwrap.wrap(TEXT, 72)) + "\n  ",
    "tabs": "\t".join(textwrap.wrap(TEXT, 72)),
    "spaces": " ".join(textwrap.wrap(TEXT, 72)),
    "carriage returns": "\r".join(textwrap.wrap(TEXT, 72)),
    "no padding": TEXT.rstrip("="),
    "URL-safe": base64.urlsafe_b64encode(PNG).decode(),
    "URL-safe, no padding": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "URL-safe, lines of 76": "\n".join(textwrap.wrap(base64.urlsafe_b64encode(PNG).decode(), 76)),
}
CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
assert "+" in TEXT
assert "/" in TEXT
assert TEXT.endswith("=")
ways = pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)


def training_image(folder, cell, name="rows.jsonl"):
    row = {"id": "a", "image": cell, "conversations": CONVERSATION}
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row]), folder / name)
    else:
        (folder / name).write_text(json.dumps(row))
    data = read_training_rows(str(folder / name))
    assert data.rejects == []
    return data.rows[0].images[0]


@ways
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_bytes_of_rows(tmp_path, text, name):
    assert training_image(tmp_path, {"bytes": text}, name).read() == PNG


@ways
@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "data:image/png;base64,\n", "DATA:Image/PNG;BASE64,"]
)
def test_data_urls_of_rows_and_requests(tmp_path, text, head):
    assert training_image(tmp_path, head + text).read() == PNG
    assert training_image(tmp_path, {"url": head + text}).read() == PNG
    assert EncodedImage.from_data_url(head + text, MediaConfig()).data == PNG


@pytest.mark.parametrize("escaped", [TEXT.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")])
@pytest.mark.parametrize("end", ["", "%0A", "%0D%0A", "%20"])
def test_percent_escapes_of_data_urls(tmp_path, escaped, end):
    url = f"data:image/png;base64,{escaped}{end}"
    assert training_image(tmp_path, url).read() == PNG
    assert EncodedImage.from_data_url(url, MediaConfig()).data == PNG


TABLE_CELLS = {
    **{name: f'"{text}"' for name, text in WRITTEN.items()},
    "data URL": f"data:image/png;base64,{TEXT}",
    "Python list": f"\"['{TEXT}', '{TEXT}']\"",
    "Python list with escapes": f"\"['{WRITTEN['lines of 76, base64 -w76']}']\"".replace("\n", "\\n"),
    "JSON list": '"' + json.dumps([TEXT, TEXT]).replace('"', '""') + '"',
    "JSON list with escapes": '"' + json.dumps([WRITTEN["lines of 76, MIME"]]).replace('"', '""') + '"',
    "JSON list over lines": '"' + json.dumps([TEXT, TEXT], indent=1).replace('"', '""') + '"',
    "JSON list with escaped slashes": '"' + json.dumps([TEXT]).replace("/", "\\/").replace('"', '""') + '"',
    "JSON list of data URLs": '"'
    + json.dumps([f"data:image/png;base64,{TEXT}"] * 2).replace('"', '""')
    + '"',
}


@pytest.mark.parametrize("cell", TABLE_CELLS.values(), ids=TABLE_CELLS)
def test_tables(tmp_path, cell):
    if "\t" in cell:
        cell = cell.replace("\t", "\n")  # a tab ends a cell only outside of quotes, but some tools write it
    (tmp_path / "a.tsv").write_bytes(f"index\timage\tquestion\n1\t{cell}\tWhat?\n".encode())
    (record,) = tsv_records(str(tmp_path / "a.tsv"), "a", ("image",), 10**6)
    assert record.problem == ""
    images = record.value["image"]
    assert len(images) == (2 if cell.count(TEXT[:40]) == 2 else 1)
    assert all(image.read() == PNG for image in images)


@pytest.mark.parametrize("text", ["A", "ABCDE", "a?c=", "AB=C", "é" * 4, "QUJD!", "%%%%"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        decode_base64(text)
    with pytest.raises(MediaError, match="not valid base64"):
        EncodedImage.from_data_url(f"data:image/png;base64,{text}", MediaConfig())


def test_line_breaks_do_not_count_as_bytes_of_a_request():
    text = WRITTEN["spaces"] + "\n" * len(TEXT)
    config = MediaConfig(max_bytes=len(PNG))
    assert EncodedImage.from_data_url(f"data:image/png;base64,{text}", config).data == PNG
    with pytest.raises(MediaError, match="more than"):
        EncodedImage.from_data_url(
            f"data:image/png;base64,{text}", config.model_copy(update={"max_bytes": len(PNG) - 1})
        )


def encoded(kind):
    buffer = io.BytesIO()
    Image.effect_noise((20, 12), 80).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("kind", FORMATS)
def test_base64_without_a_prefix_is_an_image_in_every_format(kind):
    image = parse_image(encoded(kind), "a", "/root", 1000)
    assert isinstance(image, InlineImage)
    assert image.open().size == (20, 12)


@ways
def test_base64_without_a_prefix_is_an_image_however_it_is_broken_up(text):
    assert parse_image(text, "a", "/root", 1000) == InlineImage(PNG, "a", 1000)


PATHS = {
    "a name": "photo.jpg",
    "a path": "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQ.jpg",
    "a short path": "/9j/4AAQSkZJRgABAQ",
    "a hash as name": "d41d8cd98f00b204e9800998ecf8427ed41d8cd98f00b204e9800998ecf8427e",
    "a long path without a suffix": "data/train/images/of/the/first/part/number/000000001234",
    "letters of a BMP": "Qk" + "images" * 12,
    "a URL": "https://host/iVBORw0KGgoAAAANSUhEUgAAABQAAAAMCAIAAADtbgqsAAAAAElFTkSuQmCC",
    "a name in other letters": "été/" + "a" * 60,
}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_a_path_stays_a_path(text):
    assert not is_image_base64(text)
    assert isinstance(parse_image(text, "a", "/root", 1000), FileImage)


def test_the_path_of_a_file_that_exists_is_never_base64(tmp_path):
    name = TEXT[:40].replace("/", "a")
    (tmp_path / name).write_bytes(PNG)
    assert is_image_base64(name)
    assert parse_image(name, "a", str(tmp_path), 1000) == FileImage(f"{tmp_path}/{name}", 1000)
    assert isinstance(parse_image(name, "a", f"{tmp_path}/other", 1000), InlineImage)


def test_damaged_base64_and_long_texts_are_reported_in_few_words():
    for text, words in (
        (TEXT[: len(TEXT) // 8 * 4 + 1], "not valid base64"),
        ("x" * 5000, "a text of 5,000 characters: neither a path"),
        (f"images/{'x' * 256}", "a text of 263 characters: neither a path"),
    ):
        with pytest.raises(BadRow, match=words) as error:
            parse_image(text, "#1 of row a", "/root", 1000)
        assert len(str(error.value)) < 200
    assert parse_image(f"images/{'x' * 255}", "#1 of row a", "/root", 1000).path.endswith("x")
    assert parse_image("x" * 256, "#1 of row a", "s3://root", 1000).path == f"s3://root/{'x' * 256}"


def test_base64_that_was_cut_off_is_an_image_that_cannot_be_read():
    image = parse_image(TEXT[: len(TEXT) // 8 * 4 + 2], "#1 of row a", "/root", 1000)
    with pytest.raises(ImageError, match="#1 of row a"):
        image.open()
