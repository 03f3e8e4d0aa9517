"""The entry point of the vLLM plug-in. These tests run without vLLM."""

import logging
import subprocess
import sys
import tomllib

import pytest

from skipvision.integrations.vllm import plugin
from tests.conftest import ROOT


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_another_version_of_vllm_is_left_alone(version, monkeypatch, caplog):
    monkeypatch.setattr(plugin, "_version", lambda: version)
    # vLLM, once imported, keeps its messages from other handlers.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        plugin.register()
    assert f"works with vLLM 0.32 up to, not including, 0.34, and this is {version}" in caplog.text


def test_the_entry_point_names_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "skipvision": f"{plugin.__name__}:{plugin.register.__name__}"
    }


def test_naming_the_entry_point_imports_nothing_of_vllm():
    code = (
        f"import sys, {plugin.__name__}; sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
