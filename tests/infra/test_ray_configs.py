"""The files of Ray's cluster launcher and of `serve deploy` follow Ray's schemas."""

from __future__ import annotations

import json
import re
from importlib.metadata import version

import pytest
import yaml

from tests.infra.manifests import INFRA, KUBERAY

CLUSTERS = sorted((INFRA / "ray-cluster").glob("*.yaml"))
SERVE = sorted(KUBERAY.rglob("serve.yaml"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_workers_are_spot_machines_that_scale_to_zero_and_the_head_is_not(path):
    types = yaml.safe_load(path.read_text())["available_node_types"]
    spot = {name: "spot" in json.dumps(one["node_config"]).lower() for name, one in types.items()}
    assert spot == {"head": False, "gpu": True}
    assert types["gpu"]["min_workers"] == 0
    assert types["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_nodes_demand_a_token_and_export_their_metrics(path):
    cluster = yaml.safe_load(path.read_text())
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert any(target.endswith("/.ray/auth_token") for target in cluster["file_mounts"])
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "--metrics-export-port=8080" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_workers_see_their_gpus_and_machines_have_an_image(path):
    cluster = yaml.safe_load(path.read_text())
    assert cluster["docker"]["worker_run_options"] == ["--gpus all"]
    for one in cluster["available_node_types"].values():
        assert re.search(r"ImageId|sourceImage", json.dumps(one["node_config"]))  # Ray's own is too old


def test_ray_is_that_of_the_constraints():
    assert f"ray=={version('ray')}\n" in (INFRA.parent / "constraints.txt").read_text()
