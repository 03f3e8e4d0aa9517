"""Manifests as kustomize builds them, and the schemas of KubeRay's kinds."""

from __future__ import annotations

import json
import shutil
import subprocess
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
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Manifest = dict[str, Any]


@cache
def built(overlay: str) -> list[Manifest]:
    """The manifests of an overlay. Skips the test without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl with kustomize is not installed (Debian: kubernetes-client)")
    folder = KUBERAY / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    if done.returncode and "unknown field" in done.stderr:
        pytest.skip(f"this kubectl's kustomize is too old: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


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
