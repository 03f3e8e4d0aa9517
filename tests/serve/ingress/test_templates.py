"""A model whose chat template never ends, and the other models of its ingress."""

import asyncio
import json
import shutil
import time

import httpx2 as httpx
import pytest
from ray import serve as ray_serve

import serve.ingress.routes
from serve.config import serve_config
from serve.ingress.ingress import Ingress
from serve.ingress.routes import http_app
from tests.serve.conftest import question

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEXT = [{"role": "user", "content": "?"}]
SICK = 16


@pytest.fixture
def sick(tiny_model, tmp_path):
    """The tiny model with a template that does not end if the first message is long."""
    folder = tmp_path / "sick"
    shutil.copytree(tiny_model, folder)
    file = folder / "chat_template.jinja"
    template = file.read_text()
    file.write_text(
        "{% if messages[0].content[-1].text | length > 99 %}" + ENDLESS + "{% endif %}" + template
    )
    return folder


@pytest.mark.slow
def test_other_models_answer_while_a_template_does_not_end(endpoint, sick, monkeypatch):
    async def ask(client, model, messages):
        body = {"model": model, "messages": messages, "max_tokens": 2}
        return await client.post("/v1/chat/completions", json=body)

    async def run():
        models = [{"path": str(endpoint.model), "name": "tiny"}, {"path": str(sick), "name": "sick"}]
        limits = {"template_seconds": 2.5, "request_seconds": 120}
        handle = ray_serve.get_deployment_handle("engine-tiny", "skipvision")
        ingress = Ingress(serve_config({"models": models, "limits": limits}), handle, handle)
        monkeypatch.setattr(serve.ingress.routes, "_this_ingress", lambda: ingress)
        transport = httpx.ASGITransport(http_app(serve_config({"models": models, "limits": limits})))
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=120) as client:
            assert (await ask(client, "tiny", question())).status_code == 200
            assert (await ask(client, "sick", TEXT)).status_code == 200  # the processes run
            long = [{"role": "user", "content": "x" * 100}]
            waiting = [asyncio.create_task(ask(client, "sick", long)) for _ in range(SICK)]
            report = {"models": {"sick": {"status": ""}}}
            while report["models"]["sick"]["status"] != "slow":
                await asyncio.sleep(0.2)
                report = (await client.get("/healthz")).json()
            begin = time.monotonic()
            healthy = [await ask(client, "tiny", messages) for messages in (question(), TEXT)]
            took = time.monotonic() - begin
            done = [task for task in waiting if task.done()]
            refused = await asyncio.gather(*waiting)
            after = (await client.get("/healthz")).json()
            recovered = await ask(client, "sick", TEXT)
        await ingress.close()
        return report, healthy, took, done, refused, after, recovered

    report, healthy, took, done, refused, after, recovered = asyncio.run(run())
    assert report["models"]["tiny"]["status"] == "ok"
    assert report["models"]["sick"]["status"] == "slow"
    assert report["models"]["sick"]["chat_template"]["requests"] >= SICK - 2
    assert [each.status_code for each in healthy] == [200, 200]
    assert took < 15, json.dumps(report)
    assert len(done) < SICK
    assert {each.status_code for each in refused} == {400}
    assert all("does not end within 2.5 s" in each.json()["error"]["message"] for each in refused)
    assert after["models"]["sick"]["status"] == "ok"
    assert recovered.status_code == 200
