"""Folders are searched through links, without loops; one that cannot be read is an error."""

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.caption.config import CaptionConfig, InputSection
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.data.folders import matching, walk
from skipvision.errors import ConfigError, DataError


def build(root, *, files=(), links=None):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    for name, target in (links or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target if target.startswith((".", "/")) else root / target)


def walked(root, **options):
    return [entry.below for entry in walk(LocalFileSystem(), str(root), **options)]


LINKS = {
    "to a folder elsewhere": (["set/a.png", "other/b.png"], {"set/more": "other"}, ["a.png", "more/b.png"]),
    "relative": (["set/a.png", "other/b.png"], {"set/more": "../other"}, ["a.png", "more/b.png"]),
    "through a link": (
        ["set/a.png", "other/b.png"],
        {"first": "other", "set/more": "first"},
        ["a.png", "more/b.png"],
    ),
    "to the folder itself": (["set/a.png"], {"set/self": "."}, ["a.png"]),
    "to the folder above": (["set/in/a.png"], {"set/in/up": ".."}, ["in/a.png"]),
    "in a circle": (
        ["set/x/a.png", "set/y/b.png"],
        {"set/x/to": "set/y", "set/y/to": "set/x"},
        ["x/a.png", "y/b.png"],
    ),
    "in a circle outside": (
        ["set/a.png", "p/b.png", "q/c.png"],
        {"set/p": "p", "p/q": "q", "q/p": "p"},
        ["a.png", "p/b.png", "p/q/c.png"],
    ),
    "twice to the same folder": (
        ["set/a.png", "other/b.png"],
        {"set/one": "other", "set/two": "other"},
        ["a.png", "one/b.png"],
    ),
    "to a subfolder that is searched anyway": (
        ["set/z/b.png"],
        {"set/a": "set/z"},
        ["z/b.png"],
    ),
    "to a hidden folder": (["set/.blobs/b.png"], {"set/a": "set/.blobs"}, ["a/b.png"]),
    "to a file": (["set/a.png", "other/b.png"], {"set/c.png": "other/b.png"}, ["a.png", "c.png"]),
    "to nothing": (["set/a.png"], {"set/b": "gone", "set/c.png": "gone"}, ["a.png", "b", "c.png"]),
    "to itself": (["set/a.png"], {"set/b.png": "set/b.png"}, ["a.png", "b.png"]),
    "the folder is a link": (["real/a.png", "real/in/b.png"], {"set": "real"}, ["a.png", "in/b.png"]),
}


@pytest.mark.parametrize(("files", "links", "found"), LINKS.values(), ids=LINKS)
def test_links(tmp_path, files, links, found):
    build(tmp_path, files=files, links=links)
    assert walked(tmp_path / "set") == found
    assert [entry.below for entry in matching(LocalFileSystem(), f"{tmp_path}/set/**")] == sorted(
        found
    ) or any(".blobs" in name for name in files)


def test_a_linked_folder_of_images_is_captioned(tmp_path):
    build(tmp_path, files=["set/a.png", "other/b.png"], links={"set/more": "other"})
    facts = write_manifest(InputSection(source=str(tmp_path / "set")), tmp_path / "manifest", 10)
    assert (facts.rows, dict(facts.passed_over)) == (2, {})
    assert [row.key for row in Manifest(tmp_path / "manifest").shard(0, 1)] == ["a.png", "more/b.png"]


def test_hidden_names_and_depth(tmp_path):
    build(tmp_path, files=["a.png", ".b.png", ".c/d.png", "e/f/g.png"])
    assert walked(tmp_path) == ["a.png", "e/f/g.png"]
    assert walked(tmp_path, hidden=True) == [".b.png", "a.png", ".c/d.png", "e/f/g.png"]
    assert walked(tmp_path, depth=1) == ["a.png"]


# ----------------------------------------------------------------------------------------- permissions


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o200, 0o300])
@pytest.mark.parametrize("closed", [".", "in", "in/deep"])
def test_a_folder_that_cannot_be_read_is_an_error(unprivileged, mode, closed):
    build(unprivileged, files=["set/a.png", "set/in/b.png", "set/in/deep/c.png"])
    (unprivileged / "set" / closed).chmod(mode)
    for source in ("set", "set/**/*.png"):
        with pytest.raises(DataError) as caught:
            write_manifest(InputSection(source=f"{unprivileged}/{source}"), unprivileged / "manifest", 10)
        assert "Permission denied" in str(caught.value)
        assert str((unprivileged / "set" / closed).resolve()) in str(caught.value)


def test_a_folder_inside_a_closed_one_is_a_setting_that_cannot_be_accessed(unprivileged):
    build(unprivileged, files=["closed/set/a.png"])
    (unprivileged / "closed").chmod(0)
    config = CaptionConfig(
        name="x",
        storage=str(unprivileged / "out"),
        model={"path": str(unprivileged)},
        input={"source": f"{unprivileged}/closed/set"},
    )
    with pytest.raises(ConfigError, match=r"input.source = .*closed/set.*Permission denied"):
        config.resolved()
    with pytest.raises(DataError, match="Permission denied"):
        write_manifest(config.input, unprivileged / "manifest", 10)


# -------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("folder", "pattern", "found"),
    [
        ("set [v2]", "*.png", ["a1.png", "b[1].png"]),
        ("set [v2]", "b[1]*", ["b[1].png"]),
        ("set", "[ab]*.png", ["a1.png", "b[1].png"]),
        ("set", "?1*", ["a1.png"]),
        ("what?", "**/*.png", ["a1.png", "b[1].png", "in/c.png"]),
        ("été #1 100%", "*/c.*", ["in/c.png"]),
        ("a::b", "*1.png", ["a1.png"]),
        ("-x ", "a*", ["a1.png"]),
    ],
)
def test_patterns_in_folders_with_any_name(tmp_path, folder, pattern, found):
    build(tmp_path / folder, files=["a1.png", "b[1].png", "in/c.png"])
    assert [entry.below for entry in matching(LocalFileSystem(), f"{tmp_path}/{folder}/{pattern}")] == found
    facts = write_manifest(InputSection(source=f"{tmp_path}/{folder}/{pattern}"), tmp_path / "manifest", 10)
    assert facts.rows == len(found)


def test_a_file_whose_name_has_a_star_is_itself(tmp_path):
    build(tmp_path, files=["a*.png", "ab.png"])
    facts = write_manifest(InputSection(source=f"{tmp_path}/a*.png"), tmp_path / "manifest", 10)
    assert facts.rows == 1
