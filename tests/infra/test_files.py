"""Every file in infra/ has a check of its own, and the checks find mistakes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.infra.checks import CHECKS, check
from tests.infra.manifests import INFRA

FILES = sorted(
    path for path in INFRA.rglob("*") if path.is_file() and path.name != ".env"
)  # .env is the user's


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_a_file_passes_the_check_of_its_kind(path):
    check(path)


def test_every_kind_has_a_file():
    names = [str(path.relative_to(INFRA)) for path in FILES]
    assert [pattern for pattern in CHECKS if not any(re.fullmatch(pattern, name) for name in names)] == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("terraform/main.tf", "", "a kind without a check"),
        ("compose/volumes.yaml", "", "volumes: {}"),
        ("kuberay/base/more.yaml", "", "{apiVersion: v1, kind: Pod, metadata: {name: more}}"),
        ("kuberay/components/more/kustomization.yaml", "", "{kind: Component, resources: []}"),
        ("kuberay/base/kustomization.yaml", "network.yaml", "networks.yaml"),
        ("kuberay/base/storage.yaml", "kind:", "kinds:"),
        ("kuberay/components/l4/configs/caption.yaml", "max_sequences", "max_sequence"),
        ("kuberay/components/l4/configs/serve.yaml", "min_engines", "engines"),
        ("kuberay/base/configs/serve.yaml", "import_path", "path"),
        ("ray-cluster/aws.yaml", "cluster_name", "name"),
        ("compose/.env.example", "GRAFANA_PASSWORD=", "GRAFANA_PASSWORD=admin"),
        ("compose/grafana/datasources.yaml", "url:", "uri:"),
        ("image/mlflow.txt", "boto3==", "unknown>="),
        ("grafana/batch.json", '"legendFormat"', '"legend"'),
    ],
)
def test_a_mistake_is_found(tmp_path, name, old, new):
    infra = Path(shutil.copytree(INFRA, tmp_path / "infra"))
    path = infra / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else new)
    with pytest.raises((Exception, SystemExit)):
        check(path, infra)


def test_no_file_holds_a_secret():
    assigned = re.compile(r"(?i)(?:password|secret_?key|token)\s*[:=]\s*([\w/+-]{8,})\s*$", re.MULTILINE)
    assert {str(path): found for path in FILES if (found := assigned.findall(path.read_text()))} == {}
