"""The Kubernetes manifests: schemas, jobs that parse, least privilege, and references that lead somewhere."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version

import jsonschema
import pytest
import yaml

from serve.config import serve_config
from skipvision.cost.sizing import GPUS
from tests.infra.manifests import (
    BUILDS,
    RAY_KINDS,
    ROOT,
    Manifest,
    all_templates,
    built,
    of_kind,
    pod_templates,
    schema,
)
from tests.jobs.test_job_files import load

HOME = "/opt/skipvision/"
"""The checkout in the image."""
CONFIGS = "/etc/skipvision/configs/"
PAGE = (ROOT / "docs/deploy.md").read_text()
overlays = pytest.mark.parametrize("overlay", BUILDS)


@overlays
def test_kuberays_kinds_follow_their_schemas(overlay):
    found = of_kind(built(overlay), *RAY_KINDS)
    assert {one["kind"] for one in found} == set(RAY_KINDS)
    for manifest in found:
        jsonschema.validate(manifest, schema(manifest["kind"]), jsonschema.Draft202012Validator)


def test_the_schemas_refuse_unknown_fields():
    manifest = json.loads(json.dumps(of_kind(built(BUILDS[0]), "RayCluster")[0]))
    manifest["spec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(manifest, schema("RayCluster"), jsonschema.Draft202012Validator)


@overlays
def test_core_kinds_and_pod_templates_follow_kubernetes_schemas(overlay):
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    latest = validator.latest_version().rpartition(".")[0]
    for manifest in built(overlay):
        if manifest["apiVersion"].partition("/")[0] not in ("ray.io", "monitoring.coreos.com"):
            validator.validate(manifest, latest, strict=True)
        for template in pod_templates(manifest):
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
            validator.validate({**wrapped, "template": template}, latest, strict=True)


# ------------------------------------------------------------------------------------ jobs and endpoint


@overlays
@pytest.mark.parametrize("name", ["finetune", "caption", "score"])
def test_a_jobs_entry_point_exists_and_reads_its_settings(overlay, name, monkeypatch, tmp_path):
    manifests = built(overlay)
    (job,) = (one for one in of_kind(manifests, "RayJob") if one["metadata"]["name"] == name)
    (configs,) = (one for one in of_kind(manifests, "ConfigMap") if "finetune.yaml" in one["data"])
    for file, text in configs["data"].items():
        (tmp_path / file).write_text(text)
    python, script, *argv = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    argv = [word.replace(CONFIGS, f"{tmp_path}/") for word in argv]
    monkeypatch.setenv("SKIPVISION_HOME", "/shared")
    load(ROOT / script.removeprefix(HOME), argv, monkeypatch)


@overlays
def test_jobs_start_on_request_and_wait_for_workers(overlay):
    manifests = built(overlay)
    (configs,) = (one for one in of_kind(manifests, "ConfigMap") if "finetune.yaml" in one["data"])
    assert all(job["spec"]["suspend"] for job in of_kind(manifests, "RayJob"))
    for text in configs["data"].values():
        settings = yaml.safe_load(text)
        assert settings["scaling"]["autoscaling"]
        assert fits(settings["scaling"], manifests), settings["name"]


def fits(scaling: dict, manifests: list[Manifest]) -> bool:
    """Whether a worker of a job fits on a node of some group."""
    (cluster,) = of_kind(manifests, "RayCluster")
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus, gpus = float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0))
        if scaling["cpus_per_worker"] <= cpus and scaling.get("gpus_per_worker", 0) <= gpus:
            return True
    return False


@overlays
def test_only_what_starts_on_request_has_the_label_that_keeps_it_out_of_apply(overlay):
    started = {
        one["metadata"]["labels"]["skipvision.io/start"]: one["kind"]
        for one in built(overlay)
        if "skipvision.io/start" in one["metadata"].get("labels", {})
    }
    jobs = dict.fromkeys(["finetune", "caption", "score"], "RayJob")
    assert started == {"cluster": "RayCluster", "endpoint": "RayService", **jobs}
    assert set(re.findall(r"skipvision\.io/start=(\w+)", PAGE)) <= set(started)


@overlays
def test_the_endpoint_gets_the_serve_config_and_outlives_an_upgrade(overlay):
    (service,) = of_kind(built(overlay), "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = serve_config(application["args"])
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > config.limits.request_seconds
    for model in config.models:
        scaling = model.scaling.model_dump()
        needed = {f"{what}_per_worker": scaling[f"{what}_per_engine"] for what in ("cpus", "gpus")}
        assert fits(needed, built(overlay))


@overlays
def test_jobs_and_endpoint_have_the_cluster_of_the_raycluster(overlay):
    manifests = built(overlay)
    (cluster,) = of_kind(manifests, "RayCluster")
    for one in of_kind(copy.deepcopy(manifests), "RayJob", "RayService"):
        spec = one["spec"].get("rayClusterSpec") or one["spec"]["rayClusterConfig"]
        if one["kind"] == "RayService":
            spec.pop("gcsFaultToleranceOptions", None)
            for template in pod_templates(one):
                (keys,) = (volume for volume in template["spec"]["volumes"] if volume["name"] == "keys")
                keys["emptyDir"] = {} if keys.pop("secret") else None
        text = json.dumps(spec, sort_keys=True).replace(one["metadata"]["name"], "cluster")
        assert text == json.dumps(cluster["spec"], sort_keys=True).replace(one["metadata"]["name"], "cluster")


@overlays
def test_clusters_are_of_this_ray_want_a_token_and_scale_to_zero(overlay):
    (cluster,) = of_kind(built(overlay), "RayCluster")
    spec = cluster["spec"]
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0] * len(spec["workerGroupSpecs"])


# ------------------------------------------------------------------------------------------- privileges


@overlays
def test_pods_run_without_root_and_capabilities(overlay):
    for name, template in all_templates(built(overlay)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            security = container["securityContext"]
            assert not security["allowPrivilegeEscalation"], name
            assert security["capabilities"] == {"drop": ["ALL"]}, name


@overlays
def test_containers_have_requests_and_a_memory_limit(overlay):
    for name, template in all_templates(built(overlay)):
        for container in template["spec"]["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), name
            assert resources["limits"]["memory"], name


@overlays
def test_only_heads_can_call_the_kubernetes_api(overlay):
    manifests = built(overlay)
    accounts = {one["metadata"]["name"]: one for one in of_kind(manifests, "ServiceAccount")}
    assert not any(one["automountServiceAccountToken"] for one in accounts.values())
    for name, template in all_templates(manifests):
        pod = template["spec"]
        if any(container["name"] == "ray-head" for container in pod["containers"]):
            assert "serviceAccountName" not in pod  # KubeRay's own, with a role for its namespace
        else:
            assert pod["serviceAccountName"] in accounts, name
            assert not pod["automountServiceAccountToken"], name


@overlays
def test_secrets_are_references(overlay):
    assert of_kind(built(overlay), "Secret") == []


@overlays
def test_selectors_match_the_pods_that_they_are_for(overlay):
    manifests = built(overlay)
    labels = list(pod_labels(manifests))
    for one in of_kind(manifests, "PodDisruptionBudget"):
        wanted = one["spec"]["selector"]["matchLabels"].items()
        assert any(wanted <= pod.items() for pod in labels), one["metadata"]["name"]
    selectors = [
        peer["podSelector"].get("matchLabels", {})
        for policy in of_kind(manifests, "NetworkPolicy")
        for peer in [policy["spec"], *(p for rule in policy["spec"].get("ingress", []) for p in rule["from"])]
        if "podSelector" in peer and "namespaceSelector" not in peer
    ]
    assert selectors
    for wanted in selectors:
        assert any(wanted.items() <= pod.items() for pod in labels), wanted
    for policy in of_kind(manifests, "NetworkPolicy"):  # labels that the operator of the cluster sets
        for peer in (peer for rule in policy["spec"].get("ingress", []) for peer in rule["from"]):
            for name, value in peer.get("namespaceSelector", {}).get("matchLabels", {}).items():
                assert f"{name}={value}" in PAGE


def pod_labels(manifests: list[Manifest]) -> Iterator[dict[str, str]]:
    """The labels of all pods, with those that KubeRay adds."""
    for _, template in all_templates(manifests):
        own = template.get("metadata", {}).get("labels", {})
        first = template["spec"]["containers"][0]["name"]
        node = {"ray-head": "head", "ray-worker": "worker"}.get(first)
        groups = {"head": ["headgroup"], "worker": ["cpu", "gpu"]}.get(node or "", [])
        yield own
        for group in groups:
            yield {**own, "ray.io/is-ray-node": "yes", "ray.io/node-type": node, "ray.io/group": group}


@overlays
def test_ports_of_ray_are_closed_by_default(overlay):
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(built(overlay), "NetworkPolicy")}
    assert policies["deny-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for rule in policies["ray"]["ingress"][1:]:
        assert {port["port"] for port in rule["ports"]} <= {8000, 8080, 8265}


@overlays
def test_volumes_and_their_sources_exist(overlay):
    manifests = built(overlay)
    claims = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    maps = {one["metadata"]["name"] for one in of_kind(manifests, "ConfigMap")}
    assert "serve-config" not in maps
    for manifest in manifests:
        own = {
            claim["metadata"]["name"] for claim in manifest.get("spec", {}).get("volumeClaimTemplates", [])
        }
        for template in pod_templates(manifest):
            volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
            for volume in volumes.values():
                assert volume.get("persistentVolumeClaim", {}).get("claimName", "home") in claims
                assert volume.get("configMap", {}).get("name", "job-configs") in maps
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys() | own


@overlays
def test_only_the_endpoint_mounts_the_hashes_of_the_keys(overlay):
    for manifest in built(overlay):
        for template in pod_templates(manifest):
            volumes = json.dumps(template["spec"].get("volumes", []))
            assert ("skipvision-keys" in volumes) == (manifest["kind"] == "RayService"), manifest["kind"]


@overlays
def test_ray_pods_share_the_home_and_have_serve_front(overlay):
    for name, template in all_templates(of_kind(built(overlay), *RAY_KINDS)):
        (container,) = template["spec"]["containers"]
        if container["name"] != "submitter":
            values = {one["name"]: one["value"] for one in container["env"]}
            assert values["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "serve.front:middlewares", name
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts["home"] == values["SKIPVISION_HOME"], name


def test_gpu_workers_are_on_spot_nodes_and_heads_are_not():
    (cluster,) = of_kind(built("spot"), "RayCluster")
    head, cpu, gpu = pod_templates(cluster)
    operators = {
        expression["operator"]
        for term in affinity(head)["nodeSelectorTerms"]
        for expression in term["matchExpressions"]
    }
    assert operators == {"NotIn"}
    assert len(affinity(head)["nodeSelectorTerms"]) == 1
    assert len(affinity(gpu)["nodeSelectorTerms"]) == 4
    assert "affinity" not in cpu["spec"]


def affinity(template: Manifest) -> dict:
    return template["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]


@overlays
def test_no_service_sets_variables_that_programs_read_as_their_own(overlay):
    manifests = built(overlay)
    for name, template in all_templates(manifests):
        assert template["spec"]["enableServiceLinks"] is False, name
    # Kubernetes makes VLLM_PORT of a Service `vllm`, and vLLM refuses to start.
    services = {one["metadata"]["name"] for one in of_kind(manifests, "Service")}
    assert services <= {"mlflow", "vllm-server", "redis"}


@overlays
def test_ray_reaches_pods_and_names_but_not_the_metadata_server(overlay):
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(built(overlay), "NetworkPolicy")}
    egress = policies["ray"]["egress"]
    # Cilium does not match pods by addresses.
    assert {"to": [{"namespaceSelector": {}}]} in egress
    metadata = "169.254.169.254/32"
    for rule in egress:
        blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
        for block in blocks:
            if block["cidr"] == metadata:
                assert {port["port"] for port in rule["ports"]} == {53}
            elif block["cidr"] == "0.0.0.0/0":
                assert block["except"] == [metadata]
    for name in {"vllm", "redis"} & policies.keys():
        assert policies[name]["policyTypes"] == ["Ingress", "Egress"]
        assert policies[name]["egress"] == []


@overlays
def test_a_budget_of_one_replica_lets_its_node_be_drained(overlay):
    budgets = {one["metadata"]["name"]: one["spec"] for one in of_kind(built(overlay), "PodDisruptionBudget")}
    # Without Redis a head that moves takes the endpoint down, so its drain waits for an upgrade.
    blocking = {name for name, spec in budgets.items() if "minAvailable" in spec}
    assert blocking == {"endpoint-workers"} | (set() if "redis" in budgets else {"endpoint-head"})
    group = budgets["endpoint-workers"]["selector"]["matchLabels"]["ray.io/group"]
    (service,) = of_kind(built(overlay), "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    scaling = [model["scaling"] for model in config["models"]]
    assert group == ("gpu" if any(one.get("gpus_per_engine") for one in scaling) else "cpu")
    assert group == "cpu" or all(one["min_engines"] >= 2 for one in scaling)


@overlays
def test_gpu_pods_fit_the_machine_that_is_priced(overlay):
    # Both have 8 CPUs, and 64 or 32 GiB; a node keeps some for the kubelet and DaemonSets.
    gpu, machine, memory = ("l4", "g6.2xlarge", 26) if overlay == "l4" else ("l40s", "g6e.2xlarge", 56)
    assert machine in GPUS[gpu].source
    for name, template in all_templates(built(overlay)):
        requests = template["spec"]["containers"][0]["resources"]["requests"]
        if "nvidia.com/gpu" in requests:
            assert float(requests["cpu"]) <= 7.5, name
            assert int(requests["memory"].removesuffix("Gi")) <= memory, name


@pytest.mark.parametrize(("overlay", "gpu"), [("gpu", "l40s"), ("l4", "l4")])
def test_weights_and_caches_of_a_7b_model_leave_a_tenth_of_the_gpu(overlay, gpu):
    weights = 14_126_854_144  # LLaVA-1.5-7B in bfloat16, as `python -m skipvision size --json` prints
    manifests = built(overlay)
    (configs,) = (one for one in of_kind(manifests, "ConfigMap") if "finetune.yaml" in one["data"])
    engines = [yaml.safe_load(configs["data"][name])["engine"] for name in ("caption.yaml", "score.yaml")]
    (service,) = of_kind(manifests, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    engines += [model["engine"] for model in application["args"]["models"]]
    for engine in engines:
        caches = engine["kv_budget_bytes"] + engine.get("prefix_cache_bytes", 0)
        assert weights + caches <= 0.9 * GPUS[gpu].memory


def test_the_endpoints_head_alone_keeps_its_state_in_redis():
    manifests = built("redis")
    options = {
        f"{one['kind']} {one['metadata']['name']}": "gcsFaultToleranceOptions" in json.dumps(one)
        for one in of_kind(manifests, *RAY_KINDS)
    }
    assert [name for name, kept in options.items() if kept] == ["RayService endpoint"]
    (service,) = of_kind(manifests, "RayService")
    spec = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    (redis,) = (one for one in of_kind(manifests, "Service") if one["metadata"]["name"] == "redis")
    assert spec["redisAddress"] == f"redis:{redis['spec']['ports'][0]['port']}"
    # A name of our own would be shared by the two clusters of an upgrade.
    assert spec.keys() == {"redisAddress", "redisPassword"}
    (policy,) = (one for one in of_kind(manifests, "NetworkPolicy") if one["metadata"]["name"] == "redis")
    ((peer,),) = (rule["from"] for rule in policy["spec"]["ingress"])
    assert peer["podSelector"]["matchLabels"] == {"skipvision.io/owner": "endpoint"}
    (types,) = peer["podSelector"]["matchExpressions"]
    assert types["values"] == ["head", "redis-cleanup"]


@overlays
def test_the_volume_of_the_logs_is_the_one_that_the_autoscaler_gets(overlay):
    for name, template in all_templates(of_kind(built(overlay), *RAY_KINDS)):
        (container,) = template["spec"]["containers"]
        logs = [one["name"] for one in container.get("volumeMounts", []) if one["mountPath"] == "/tmp/ray"]
        assert logs in ([], ["ray-logs"]), name


@overlays
def test_no_secret_is_in_the_arguments_of_a_process(overlay):
    for name, template in all_templates(built(overlay)):
        for container in template["spec"]["containers"]:
            secret = {one["name"] for one in container.get("env", []) if "valueFrom" in one}
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            assert not any(f"$({variable})" in words for variable in secret), name
