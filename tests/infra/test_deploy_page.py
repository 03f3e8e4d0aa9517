"""The commands of docs/deploy.md that need neither a container nor a cluster of Kubernetes or of a cloud.

`test_services` runs those of compose.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster.local import LocalRay, local_ray
from tests.infra.clusters import free_port, wait_for
from tests.infra.manifests import INFRA, OVERLAYS, built, of_kind

ROOT = INFRA.parent
PAGE = (ROOT / "docs/deploy.md").read_text()
COMMANDS = [
    shlex.split(re.sub(r"\\\n\s*", "", line), comments=True)
    for line in re.findall(r"^    (\S(?:.*\\\n)*.*)$", PAGE, flags=re.MULTILINE)
    if not line.startswith(("GPU ", "l4 ", "l40s ", "h100 "))
]


def starting_with(*words: str) -> list[list[str]]:
    found = [command for command in COMMANDS if command[: len(words)] == list(words)]
    assert found, f"docs/deploy.md has no command `{shlex.join(words)}`"
    return found


needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@needs_kubectl
def test_kubectl_would_create_the_namespace_and_the_secrets(tmp_path):
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    created = [
        *starting_with("kubectl", "create", "namespace"),
        *starting_with("kubectl", "--namespace", "skipvision", "create"),
    ]
    objects = []
    for command in created:
        done = subprocess.run(
            [*command, "--dry-run=client", "--output=json"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        objects.append(json.loads(done.stdout))
    assert {one["metadata"]["name"]: sorted(one.get("data", {})) for one in objects} == {
        "skipvision": [],
        "skipvision-keys": ["keys.yaml"],
        "mlflow": ["artifacts-destination", "backend-store-uri"],
        "vllm": ["api-key"],
        "redis": ["password"],
    }


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_kustomization_of_the_page_replaces_every_image(overlay, tmp_path):
    built(overlay)  # skips where kustomize is too old
    (own,) = re.findall(r"```yaml\n(# kustomization.yaml\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(own.replace("overlays/gpu", f"overlays/{overlay}"))
    shutil.copytree(INFRA, tmp_path / "infra")
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = set(re.findall(r"\bimage: (\S*skipvision\S*)", done.stdout))
    assert "registry.example.org/skipvision:cuda-2026-12-01" in images
    assert {image.partition("/")[0] for image in images} == {"registry.example.org"}
    assert ("registry.example.org/skipvision-vllm:cuda-2026-12-01" in images) == (overlay == "vllm")


@needs_kubectl
def test_own_settings_reach_every_cluster(tmp_path):
    built("gpu")
    for name, text in re.findall(r"```yaml\n# (\S*kustomization\.yaml), [^\n]*\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(INFRA, tmp_path / "infra")
    shutil.copy(INFRA / "kuberay/components/gpu/configs/serve.yaml", tmp_path / "own/serve.yaml")
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    (home,) = [
        one for one in of_kind(manifests, "PersistentVolumeClaim") if one["metadata"]["name"] == "home"
    ]
    assert home["spec"]["storageClassName"] == "efs"
    (service,) = of_kind(manifests, "RayService")
    assert service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["maxReplicas"] == 2
    assert service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    assert {"PodMonitor", "PrometheusRule", "StatefulSet"} <= {one["kind"] for one in manifests}


@needs_kubectl
def test_the_patch_of_the_page_starts_a_suspended_job(tmp_path):
    (command,) = starting_with("kubectl", "--namespace", "skipvision", "patch", "rayjob")
    kind, name, *options = command[4:]
    (job,) = [one for one in of_kind(built("gpu"), "RayJob") if one["metadata"]["name"] == name]
    assert (kind, job["spec"]["suspend"]) == ("rayjob", True)
    (tmp_path / "job.json").write_text(json.dumps(job))
    local = [*command[:4], "--local", "--filename", tmp_path / "job.json", "--output=json", *options]
    done = subprocess.run(local, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"]["suspend"] is False


@needs_kubectl
def test_the_page_names_objects_that_exist():
    objects = {(one["kind"].lower(), one["metadata"]["name"]) for one in built("gpu")}
    named = {tuple(command[4:6]) for command in starting_with("kubectl", "--namespace", "skipvision", "get")}
    named -= {("pod", "-l")}  # in a command inside another
    named -= {("secret", "cluster")}  # KubeRay creates it
    waits = starting_with("kubectl", "--namespace", "skipvision", "wait")
    named |= {tuple(command[4].split("/")) for command in waits}
    assert named == {("rayservice", "endpoint"), ("rayjob", "finetune"), ("raycluster", "cluster")}
    assert named <= objects
    (cluster,) = set(re.findall(r"ray\.io/cluster=(\w+)", PAGE))
    assert ("raycluster", cluster) in objects


@pytest.mark.parametrize(
    "message", ["do not fit", "more than the cluster holds", "a relative path ends in a throw-away copy"]
)
def test_the_troubleshooting_quotes_errors_of_the_jobs(message):
    assert f"`{message}`" in PAGE
    sources = "".join(path.read_text() for path in (ROOT / "pipelines").rglob("*.py"))
    assert message in re.sub(r'"\s*f?"', "", sources)  # strings go over several lines


@pytest.mark.slow
def test_ray_generates_the_token_that_the_launcher_copies(tmp_path):
    (command,) = starting_with("ray", "get-auth-token")
    binary = Path(sys.executable).with_name("ray")
    done = subprocess.run(
        [binary, *command[1:]], env={"HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    token = (tmp_path / ".ray/auth_token").read_text()
    assert len(token) >= 32
    assert token in done.stdout


def adapted(folder: Path) -> tuple[Path, int]:
    """The Serve config with paths and a port of this machine."""
    (command,) = starting_with("serve", "deploy")
    config = yaml.safe_load((ROOT / command[2]).read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = config["applications"]
    (model,) = application["args"]["models"]
    model["path"] = model["path"].replace("/opt/skipvision", str(ROOT))
    model["scaling"]["cpus_per_engine"] = 0.5
    application["args"]["keys_file"] = str(folder / "keys.yaml")
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    return folder / "serve.yaml", config["http_options"]["port"]


def serve(ray: LocalRay, *words: str) -> str:
    binary = Path(sys.executable).with_name("serve")
    environment = {
        "PATH": "",
        "PYTHONPATH": str(ROOT),  # the packages, as on every node
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray.token,
        "RAY_DASHBOARD_ADDRESS": ray.dashboard,
    }
    done = subprocess.run([binary, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(port: int, key: str) -> Any:
    messages = [{"role": "user", "content": "What is it?"}]
    body = json.dumps({"model": "shapes-llava", "max_tokens": 4, "messages": messages}).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_serve_deploy_starts_the_endpoint_on_a_cluster(tmp_path, monkeypatch):
    (command,) = starting_with("python", "-m", "serve.keys", "new")
    done = subprocess.run(
        [sys.executable, *command[1:-1], tmp_path / command[-1]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (key,) = re.findall(r"sk-skip-\S+", done.stdout)
    config, port = adapted(tmp_path)
    # The requirements of the page for every node.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.front:middlewares")
    with local_ray() as ray:
        serve(ray, "deploy", str(config))

        def status() -> str:
            return str(yaml.safe_load(serve(ray, "status"))["applications"]["skipvision"]["status"])

        assert wait_for(lambda: status() in ("RUNNING", "DEPLOY_FAILED"), 600)
        assert status() == "RUNNING", serve(ray, "status")
        assert ask(port, key)["usage"]["completion_tokens"] > 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(port, "sk-skip-another")
        config.write_text(config.read_text().replace(str(tmp_path / "keys.yaml"), "/nowhere/keys.yaml"))
        serve(ray, "deploy", str(config))
        assert wait_for(lambda: status() == "DEPLOY_FAILED", 300)
        assert "/nowhere/keys.yaml" in serve(ray, "status")
