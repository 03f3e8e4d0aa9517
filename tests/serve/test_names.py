"""Names of models and adapters: clients send them, also in paths, and the page shows them."""

import pytest

from serve.config import ModelSection, serve_config
from skipvision.errors import ConfigError

RULE = "letters, digits and any of"


@pytest.mark.parametrize("field", ["adapter", "model"])
@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "a/../b",
        "a/./b",
        "/x",
        "x/",
        "a//b",
        "<b>x</b>",
        "a b",
        "a\nb",
        "a\x00b",
        "a?b",
        "a#b",
        "a%2Fb",
        "a\\b",
        "-x",
        "_x",
        "x" * 129,
        "\u202ex",
        "a�",
    ],
)
def test_other_names_are_refused_with_the_rule(field, name):
    changes = {"adapters": {name: "somewhere"}} if field == "adapter" else {"name": name}
    with pytest.raises(ConfigError, match=RULE):
        serve_config({"models": [{"path": "m", **changes}]})


@pytest.mark.parametrize(
    "name", ["red", "org/blue", "v1.2", "a_b-c", "x:1", "x@champion", "1", "modèle", "x" * 128]
)
def test_plain_names_are_kept(name):
    config = serve_config({"models": [{"path": "m", "name": "base", "adapters": {name: "somewhere"}}]})
    assert [*config.served()] == ["base", name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/shapes-llava", "shapes-llava"),
        ("owner/model-7b", "model-7b"),
        ("/data/My Drive/été #1 100%", "été-1-100"),
        ("/data/a:b", "a:b"),
        ("/data/###", "model"),
        ("/", "model"),
    ],
)
def test_the_name_of_a_folder_becomes_one_for_clients(path, name):
    assert ModelSection(path=path).served_name == name


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert ModelSection(path=".").served_name == "tiny"
