"""A deployment that its machine has no room for is refused; one that waits for nodes says so."""

import time
from types import SimpleNamespace

import pytest

import serve.deploy
from serve import capacity
from serve.capacity import check_capacity, report_waiting
from serve.config import serve_config
from serve.deploy import run_deploy
from skipvision.errors import ResourceError


def config(models=1, **scaling):
    return serve_config({"models": [{"path": f"m{n}", "scaling": scaling} for n in range(models)]})


def nodes(*cpus, gpus=0):
    return [{"CPU": float(count), "GPU": float(gpus)} for count in cpus]


FITS = {
    "one model on one CPU": (config(1), nodes(1)),
    "two models on two CPUs": (config(2), nodes(2)),
    "four models on two nodes": (config(4), nodes(2, 2)),
    "engines on demand start one": (config(1, min_engines=0, max_engines=4), nodes(1)),
    "GPUs that are shared": (config(2, gpus_per_engine=0.5), nodes(4, gpus=1)),
}
TOO_MANY = {
    "two models on one CPU": (config(2), nodes(1), "reserve 1.75 CPUs together, but there are 1 CPUs"),
    "engines with a whole CPU": (config(2, cpus_per_engine=1), nodes(2), "2.25 CPUs together"),
    "several engines": (config(1, min_engines=3, max_engines=3), nodes(2), "3 engine.s. of 1 model"),
    "no GPU": (config(1, gpus_per_engine=1), nodes(8), "1 CPUs and 1 GPUs together, but there are 8 CPUs:"),
    "an engine larger than each node": (
        config(1, cpus_per_engine=3),
        nodes(2, 2),
        "there are 2 CPUs; 2 CPUs",
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_deployment_that_fits(name):
    check_capacity(*FITS[name])


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_deployment_that_does_not_fit(name):
    settings, there, message = TOO_MANY[name]
    with pytest.raises(ResourceError, match=message):
        check_capacity(settings, there)


def test_it_is_refused_before_ray_starts(tiny_model, monkeypatch):
    def started():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(serve.deploy, "ray_session", started)
    monkeypatch.setattr(serve.deploy, "ray_is_running", lambda: False)
    with pytest.raises(ResourceError, match=r"lower scaling\.cpus_per_engine"):
        run_deploy(
            serve_config({"models": [{"path": str(tiny_model), "scaling": {"cpus_per_engine": 10_000}}]})
        )


def test_a_deployment_that_waits_says_so_once(monkeypatch, capsys):
    message = "Deployment 'engine-m' has 1 replicas that have taken more than 30s to be scheduled."
    status = SimpleNamespace(
        applications={
            "app": SimpleNamespace(
                deployments={
                    "engine-m": SimpleNamespace(message=message),
                    "ingress": SimpleNamespace(message=""),
                }
            )
        }
    )
    monkeypatch.setattr(capacity.ray_serve, "status", lambda: status)
    monkeypatch.setattr(capacity, "_POLL_SECONDS", 0.01)
    with report_waiting("app"):
        time.sleep(0.2)
    assert capsys.readouterr().out.splitlines() == [f"waiting for resources: {message}"]
