"""The settings of the endpoint are checked before anything starts."""

import json
import re
from pathlib import Path

import click
import pytest

from pipelines.shared.config import load_config
from serve.app import build
from serve.config import ServeConfig, serve_config
from skipvision import ConfigError

ROOT = Path(__file__).parents[2]


def test_all_invalid_settings_are_reported(tmp_path):
    with pytest.raises(ConfigError, match="nothing to serve"):
        build({})
    with pytest.raises(ConfigError, match="adapter without model"):
        build({"adapter": "x"})
    with pytest.raises(ConfigError) as caught:
        build({"model": "x", "limits.images": -1, "limits.imagess": 3})
    assert "limits.images = -1" in str(caught.value)
    assert "limits.imagess" in str(caught.value)
    with pytest.raises(ConfigError, match=r"there is no .*missing"):
        build({"model": str(tmp_path / "missing")})
    with pytest.raises(ConfigError, match="names used twice: a"):
        build({"models": [{"path": "m/a"}, {"path": "n/a"}]})


def test_rays_command_prints_the_error_without_a_traceback(capsys):
    @click.command()
    @click.argument("model")
    def run(model: str) -> None:
        build({"model": model})

    with pytest.raises(SystemExit) as ended:
        run(["/nowhere"])
    assert ended.value.code == 1
    assert re.fullmatch(r"Error: .*there is no .*/nowhere.*\n", capsys.readouterr().err)


def test_model_and_adapter_are_one_model():
    config = serve_config({"model": "m/base", "adapter": "runs/a", "limits.images": 2})
    assert config.served() == {"base": (0, None), "adapter": (0, "adapter")}
    assert config.limits.images == 2
    again = ServeConfig.model_validate(json.loads(config.model_dump_json()))
    assert again.served() == config.served()


def test_both_commands_of_the_docs_serve_the_model_of_their_example():
    page = (ROOT / "docs/serving.md").read_text()
    words = re.search(r"serve run serve\.app:build (.*)", page)[1].split()
    options = re.search(r"jobs/deploy\.py (--config .*)", page)[1].split()
    flat = serve_config(dict(word.split("=") for word in words))
    job = load_config(
        ServeConfig, [option.replace("jobs/", f"{ROOT}/jobs/") for option in options], description=""
    )
    assert flat.served() == job.served()
    assert re.search(r'model="([^"]+)"', page)[1] in job.served()
    assert f'base_url="http://{job.host}:{job.port}/v1"' in page
    assert job.port == flat.port
