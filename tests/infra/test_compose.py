"""The compose files: their schema, closed ports, and references that lead somewhere."""

from __future__ import annotations

import re
from functools import cache

import yaml

from tests.infra.manifests import INFRA

FOLDER = INFRA / "compose"
TEXTS = {name: (FOLDER / name).read_text() for name in ("compose.yaml", "compose.cuda.yaml")}
FILES = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
SERVICES = FILES["compose.yaml"]["services"]
VARIABLE = r"(?<!\$)\$\{(\w+)([^}]*)\}"
"""A variable that compose replaces: its name, and what follows it, such as ``:-default`` or ``:?message``."""


def variables(file: str) -> list[tuple[str, str]]:
    return re.findall(VARIABLE, TEXTS[file])


def test_ports_are_published_on_loopback_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_secrets_come_from_the_environment_and_have_no_default():
    example = set(re.findall(r"^(\w+)=$", (FOLDER / ".env.example").read_text(), re.MULTILINE))
    sources = {one["environment"] for one in FILES["compose.yaml"]["secrets"].values()}
    assert sources == example
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert used == set(FILES["compose.yaml"]["secrets"])
    assert [name for name, rest in variables("compose.yaml") if name in example and "-" in rest[:2]] == []


def test_an_unset_or_empty_secret_is_refused_before_anything_starts():
    example = set(re.findall(r"^(\w+)=$", (FOLDER / ".env.example").read_text(), re.MULTILINE))
    required = "".join(FILES["compose.yaml"]["x-required"])
    assert {name for name, rest in re.findall(VARIABLE, required) if rest.startswith(":?")} == example


def test_the_tags_of_our_images_can_be_set():
    ours = [
        service["image"]
        for file in FILES.values()
        for service in file["services"].values()
        if "image" in service
    ]
    untagged = [
        image for image in ours if image.startswith("skipvision") and ":${SKIPVISION_TAG:-" not in image
    ]
    assert untagged == []
    (cuda,) = {service["image"] for service in FILES["compose.cuda.yaml"]["services"].values()}
    assert cuda == "skipvision:${SKIPVISION_TAG:-cuda}"


def test_only_mlflow_and_its_bucket_reach_the_stores():
    reach = {name for name, service in SERVICES.items() if "stores" in service.get("networks", [])}
    assert reach == {"postgres", "s3", "mlflow", "bucket"}
    for name in ("postgres", "s3"):
        assert SERVICES[name]["networks"] == ["stores"]
        assert "ports" not in SERVICES[name]
    assert "default" in SERVICES["mlflow"]["networks"]  # where Ray's nodes are


def test_mounted_files_and_volumes_exist():
    volumes = set(FILES["compose.yaml"]["volumes"])
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in volumes


def test_services_that_are_waited_for_exist_and_report_their_health():
    for service in SERVICES.values():
        depends = service.get("depends_on", {})
        for name in depends:
            assert name in SERVICES
            if isinstance(depends, dict) and depends[name]["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]


def test_images_are_ours_or_have_a_version():
    for service in SERVICES.values():
        name, _, tag = service["image"].rpartition(":")
        ours = service["image"].startswith("skipvision")
        assert ours or (name.startswith("docker.io/") and re.search(r"\d+\.\d+", tag))


@cache
def grafana(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"grafana/{name}.yaml").read_text())


def test_grafana_is_given_prometheus_and_every_dashboard():
    (source,) = grafana("datasources")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in SERVICES
    assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]
    (provider,) = grafana("dashboards")["providers"]
    folder = provider["options"]["path"]
    assert f"../grafana:{folder}:ro" in SERVICES["grafana"]["volumes"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (INFRA / "grafana" / home.removeprefix(f"{folder}/")).exists()


def test_prometheus_scrapes_every_node_of_ray_under_the_name_of_the_rules():
    settings = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (scrape,) = settings["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    nodes = [name for name, one in SERVICES.items() if "ray start" in str(one.get("command"))]
    assert sorted(found["names"]) == sorted(nodes)
    for name in nodes:
        assert f"--metrics-export-port={found['port']}" in SERVICES[name]["command"]
    assert f'job="{scrape["job_name"]}"' in (INFRA / "prometheus/rules.yaml").read_text()
    mounts = " ".join(SERVICES["prometheus"]["volumes"])
    assert all(f":{file}:ro" in mounts for file in settings["rule_files"])
