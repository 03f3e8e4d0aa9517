"""Manifests as kustomize builds them, and the schemas of KubeRay's kinds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
COMPOSED = {"redis": ("gpu", "spot", "monitoring", "assemble", "redis")}
"""Components on the base that no overlay has, as docs/deploy.md composes them."""
BUILDS = [*OVERLAYS, *COMPOSED]
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Manifest = dict[str, Any]


@cache
def built(name: str) -> list[Manifest]:
    """The manifests of an overlay or a composition. Skips the test without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl with kustomize 5 is not installed (kubectl 1.27 or newer)")
    if name in OVERLAYS:
        return _build(KUBERAY / "overlays" / name)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(os.path.relpath(KUBERAY, Path(folder).resolve()))  # kustomize takes no absolute paths
        tree = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "skipvision",
            "resources": [str(base / "base")],
            "components": [str(base / "components" / component) for component in COMPOSED[name]],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(tree))
        return _build(Path(folder))


def _build(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    if done.returncode and "unknown field" in done.stderr:
        pytest.skip(f"this kubectl's kustomize is too old: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def reached(kuberay: Path) -> set[Path]:
    """The files of the overlays and compositions, as their kustomizations name them."""
    starts = [*(kuberay / "overlays").iterdir(), kuberay / "base"]
    starts += [kuberay / "components" / name for names in COMPOSED.values() for name in names]
    found: set[Path] = set()
    while starts:
        path = starts.pop().resolve()
        if path in found:
            continue
        if path.is_file():
            found.add(path)
            continue
        kustomization = path / "kustomization.yaml"
        found.add(kustomization)
        starts += [path / name for name in named_in(yaml.safe_load(kustomization.read_text()))]
    return found


def named_in(kustomization: Manifest) -> list[str]:
    """The files and folders that a kustomization names."""
    named = [*kustomization.get("resources", []), *kustomization.get("components", [])]
    named += [patch["path"] for patch in kustomization.get("patches", []) if "path" in patch]
    return named + [file for one in kustomization.get("configMapGenerator", []) for file in one["files"]]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pod_templates(manifest: Manifest) -> list[Manifest]:
    """The pod templates of a manifest: of Ray's nodes, of a job's submitter, of a Deployment."""
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    nodes = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if "headGroupSpec" in cluster else []
    own = [spec[name] for name in ("template", "submitterPodTemplate") if name in spec]
    return [*(node["template"] for node in nodes), *own]


def all_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for manifest in manifests:
        for number, template in enumerate(pod_templates(manifest)):
            yield f"{manifest['kind']} {manifest['metadata']['name']} #{number}", template


@cache
def schema(kind: str) -> dict[str, Any]:
    """The schema of one of KubeRay's kinds. It refuses unknown fields, which Kubernetes would drop."""
    return _strict(json.loads((Path(__file__).parent / "kuberay" / f"{kind}.json").read_text()))


def _strict(part: Any) -> Any:
    if isinstance(part, list):
        return [_strict(one) for one in part]
    if not isinstance(part, dict):
        return part
    strict = {name: _strict(value) for name, value in part.items()}
    if isinstance(part.get("properties"), dict) and "type" in part:
        strict.setdefault("additionalProperties", False)
    return strict
