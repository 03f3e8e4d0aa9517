"""Base64 is read with the line breaks that tools put into it: in rows, tables and requests."""

import base64
import io
import json
import textwrap

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.encoded import decode_base64
from pipelines.data.training_rows import read_training_rows
from pipelines.data.tsv_records import tsv_records
from serve.errors import MediaError
from serve.media.config import MediaConfig
from serve.media.images import EncodedImage


def png():
    buffer = io.BytesIO()
    Image.effect_noise((20, 12), 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


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
}
CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
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


@pytest.mark.parametrize("text", ["A", "AB", "ABC", "a?c=", "é" * 4, "QUJD!", "%%%%"])
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
