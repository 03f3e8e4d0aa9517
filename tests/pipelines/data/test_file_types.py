"""Paths that are no regular files: named pipes would hang a job, sockets and devices fail in riddles."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.caption.config import InputSection
from pipelines.caption.manifest import write_manifest
from pipelines.data.images import FileImage, ImageError
from pipelines.data.training_rows import read_training_rows
from pipelines.engines.config import ModelSection
from pipelines.engines.model import find_model
from pipelines.evaluation.items import read_items
from pipelines.shared.config import load_config
from serve.keys import KeyRing
from skipvision import SkipConfig
from skipvision.adapters.files import read_adapter
from skipvision.errors import SkipVisionError
from skipvision.loading import check_folder


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # an absolute path may be too long


KINDS = {
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def manifest(folder, **settings):
    section = InputSection(**{"prompt": "What?", **settings})
    write_manifest(section, folder / "manifest", 10, say=lambda _: None)


READERS = {
    "image": ("a.png", lambda path: FileImage(str(path)).open()),
    "bytes of an image": ("a.png", lambda path: FileImage(str(path)).read()),
    "check of an image": ("a.png", lambda path: FileImage(str(path)).check_exists()),
    "training rows": ("rows.jsonl", lambda path: read_training_rows(str(path))),
    "training table": ("rows.parquet", lambda path: read_training_rows(str(path))),
    "training arrow": ("rows.arrow", lambda path: read_training_rows(str(path))),
    "image to caption": ("a.png", lambda path: manifest(path.parent, source=str(path))),
    "rows to caption": ("rows.json", lambda path: manifest(path.parent, source=str(path))),
    "tar to caption": ("rows.tar", lambda path: manifest(path.parent, source=str(path))),
    "table to caption": ("rows.tsv", lambda path: manifest(path.parent, source=str(path))),
    "keys": ("keys", lambda path: manifest(path.parent, source=str(path.parent / "x.jsonl"), keys=str(path))),
    "settings": ("a.yaml", lambda path: load_config(InputSection, ["--config", str(path)], description="")),
    "SkipConfig": ("skip.json", SkipConfig.from_json),
    "adapter": ("skip_config.json", lambda path: read_adapter(path.parent)),
    "adapter's weights": ("adapter/adapter_model.safetensors", lambda path: read_adapter(path.parent)),
    "model": ("model/model.safetensors", lambda path: check_folder(path.parent)),
    "scored items": ("items.parquet", read_items),
    "API keys": ("keys.yaml", lambda path: KeyRing(str(path))),
}
FOLDERS = {"image to caption", "rows to caption", "tar to caption", "table to caption"}


@kinds
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_names_what_is_no_file(tmp_path, monkeypatch, kind, reader):
    if kind == "a folder" and (reader in FOLDERS or "/" in READERS[reader][0]):
        pytest.skip("a folder of images is an input, and folders may be in models and adapters")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    name, read = READERS[reader]
    path = tmp_path / name
    if path.parent != tmp_path:
        path.parent.mkdir()
        (path.parent / "skip_config.json").write_text("{}")
        (path.parent / "config.json").write_text("{}")
    KINDS[kind](path)
    with pytest.raises(SkipVisionError) as caught:
        read(path)
    text = str(caught.value)
    assert path.name in text or str(path) in text
    assert kind in text or (reader, kind) == ("adapter", "a folder")  # "Is a directory"
    assert "Errno" not in text


@kinds
def test_one_in_a_folder_or_in_a_row_becomes_an_error_row(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    for check in ("decode", "exists"):
        (reject,) = read_training_rows(str(tmp_path / "rows.json"), check_images=check).rejects
        assert (reject.kind, kind in reject.reason) == ("unreadable image", True)
    with pytest.raises(ImageError, match=kind):
        FileImage(str(tmp_path / "a.png")).open()


def test_settings_and_keys_may_come_from_a_command(tmp_path):
    read, write = os.pipe()
    os.write(write, b"source: x.jsonl\n")
    os.close(write)
    try:
        assert load_config(InputSection, ["--config", f"/dev/fd/{read}"], description="").source == "x.jsonl"
    finally:
        os.close(read)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", "é".encode("latin-1")])
def test_keys_that_are_no_text(tmp_path, content):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(SkipVisionError, match=r"input\.keys = .*not text in UTF-8"):
        manifest(tmp_path, source=str(Path(tmp_path)), keys=str(tmp_path / "keys"))


def test_unreadable_keys_and_models(unprivileged):
    (unprivileged / "x.jsonl").write_text('{"image": "a.png"}\n')
    (unprivileged / "keys").write_text("a")
    (unprivileged / "keys").chmod(0)
    with pytest.raises(SkipVisionError, match=r"input\.keys = .*Permission denied; give this user"):
        manifest(unprivileged, source=str(unprivileged / "x.jsonl"), keys=str(unprivileged / "keys"))
    (unprivileged / "model").mkdir()
    (unprivileged / "model").chmod(0)
    with pytest.raises(SkipVisionError, match=r"model.* cannot be read: Permission denied; make it readable"):
        check_folder(unprivileged / "model")
    with pytest.raises(SkipVisionError, match=r"model cannot be read: Permission denied"):
        read_adapter(unprivileged / "model")
    with pytest.raises(SkipVisionError, match=r"model\.adapter = .* cannot be read: Permission denied"):
        find_model(
            SimpleNamespace(model=ModelSection(path="a/b", adapter=str(unprivileged / "model")), skip=None),
            "",
            unprivileged,
            None,
        )
