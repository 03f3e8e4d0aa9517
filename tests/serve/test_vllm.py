"""The endpoint on vLLM: what is particular to it. `tests/serve/chat` runs on either engine."""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import replace

import httpx2 as httpx
import openai
import psutil
import pytest
from ray import serve as ray_serve
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.engines.vllm.meter import UNMEASURED
from serve.errors import DeadlineError
from serve.replica.messages import Work
from skipvision import Engine, Request, Sampling, SkipConfig, load_adapter
from tests.backend import on_vllm
from tests.serve.conftest import LONG, eventually, noise, question

pytestmark = [on_vllm, pytest.mark.slow, pytest.mark.timeout(900)]
OTHER = {"retained": 2, "skipped": 0, "summary_tokens": 0, "select": "diversity"}


@pytest.fixture(scope="module")
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def handle(endpoint):
    return ray_serve.get_deployment_handle("engine-tiny", "skipvision").options(_by_reference=False)


def ask(client, model="tiny", skip=None, **options):
    options = {"messages": question(), "temperature": 0, "max_completion_tokens": 12, **options}
    body = {} if skip is None else {"skip": skip}
    return client.chat.completions.create(model=model, extra_body=body, **options)


def statistics(handle):
    return handle.statistics.remote().result()


def idle(handle):
    """Whether vLLM's own engine takes no steps, rather than that nobody waits for them."""
    before = statistics(handle)
    time.sleep(0.5)
    return before.running == 0 and statistics(handle).decode_steps == before.decode_steps


@pytest.mark.parametrize("model", ["tiny", "red", "blue"])
@pytest.mark.parametrize("skip", [OTHER, "full"], ids=["other", "full"])
def test_a_request_chooses_its_skipconfig(client, endpoint, model, skip):
    base = AutoModelForImageTextToText.from_pretrained(endpoint.model)
    processor = AutoProcessor.from_pretrained(endpoint.model)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    with Engine(load_adapter(base, endpoint.adapters["red"], name="red"), processor) as engine:
        engine.add_adapter("blue", endpoint.adapters["blue"])
        request = Request(
            messages,
            [noise(0)],
            sampling=Sampling(max_new_tokens=12),
            adapter="__base__" if model == "tiny" else model,
            skip=skip if skip == "full" else SkipConfig(**OTHER),
        )
        (right,) = engine.run([request])
    found = ask(client, model, skip)
    assert found.choices[0].message.content == right.text
    kept = 16 if skip == "full" else 2
    assert found.usage.visual_tokens == {"total": 16, "retained": kept, "skipped": 0, "cached": kept}
    assert found.usage.prompt_tokens == right.usage.prompt_tokens
    assert found.usage.kv_bytes == right.usage.kv_bytes


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"retained": 4, "skipped": 6, "summary_tokens": 0}, "skipped=0 for the same FLOPs"),
        ({**OTHER, "select": "ffn_ratio"}, "select='ffn_ratio' reads the decoder"),
        ({**OTHER, "summary_tokens": 3}, "summary_tokens=3, but the model on this server has no summary"),
        ({**OTHER, "retained": 0, "merge": "drop"}, "skip keeps none of the 16 tokens"),
    ],
    ids=["skipped", "select", "summary", "nothing"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_skipconfig_that_vllm_cannot_run_is_refused(client, skip, message, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, skip=skip, stream=stream)
    assert message in refused.value.message
    assert (refused.value.param, refused.value.code) == ("skip", "invalid_value")


def test_skipped_tokens_are_mapped_where_the_settings_say_so(guarded):
    """The answer is that of retained tokens of equal FLOPs, and its usage counts them."""
    with openai.OpenAI(base_url=guarded.url, api_key=guarded.alice, max_retries=0, timeout=120) as alice:
        skipping = {"retained": 4, "skipped": 6, "summary_tokens": 0}
        found = ask(alice, "small", skipping)
        counts = found.usage.visual_tokens
        assert 4 < counts["retained"] < 10
        assert (counts["total"], counts["skipped"], counts["cached"]) == (16, 0, counts["retained"])
        equal = ask(alice, "small", {**skipping, "retained": counts["retained"], "skipped": 0})
    assert found.choices[0].message.content == equal.choices[0].message.content


def test_a_text_without_images_is_answered(client):
    found = ask(client, messages=[{"role": "user", "content": "hi"}], stop=["zzz"])
    assert found.usage.visual_tokens == {"total": 0, "retained": 0, "skipped": 0, "cached": 0}
    assert found.usage.completion_tokens


def test_an_answer_ends_at_the_last_position_of_the_model(client):
    """Pruned images leave their positions unused, and the answer must not go past the last one."""
    options = {"messages": question("x" * 380), "response_format": LONG, "max_completion_tokens": None}
    found = ask(client, skip=OTHER, **options)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == 512
    with pytest.raises(openai.BadRequestError, match="too few for an answer of 300 tokens") as refused:
        ask(client, skip=OTHER, **{**options, "max_completion_tokens": 300})
    assert refused.value.code == "context_length_exceeded"


def test_tokens_are_streamed_as_they_are_generated(client):
    stream = ask(client, stream=True, max_completion_tokens=400, response_format=LONG)
    times = [time.monotonic() for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(times) > 100
    first, last = times[len(times) // 10] - times[0], times[-1] - times[0]
    assert first < last / 2


def test_overlays_are_refused(endpoint):
    body = {"model": "tiny", "messages": question()}
    response = httpx.post(f"{endpoint.url}/v1/overlay", json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported")
    assert "engine.backend native" in error["message"]


def test_a_deadline_ends_an_answer_in_vllm(endpoint, handle):
    processor = AutoProcessor.from_pretrained(endpoint.model)
    messages = [{"role": "user", "content": [{"type": "text", "text": "hm"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    schema = json.dumps(LONG["json_schema"]["schema"])
    request = Request(text, sampling=Sampling(max_new_tokens=400, n=2))

    def answer(seconds, **changes):
        work = Work(replace(request, **changes), time.time() + seconds, schema)
        return handle.answer.remote(work).result()

    whole = answer(60)
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    cut = answer(max(whole.timing.total / 2, 0.2))
    assert {choice.finish_reason for choice in cut.choices} == {"deadline"}
    assert 0 < cut.usage.completion_tokens < whole.usage.completion_tokens
    for one, other in zip(cut.choices, whole.choices, strict=True):
        # Later on, rounding in other batches may break ties of a random model differently.
        assert one.text[:20] == other.text[:20]
    assert isinstance(answer(0.001), DeadlineError)
    assert idle(handle)


def test_vllm_stops_when_nobody_waits_for_the_answer(client, handle):
    options = {"max_completion_tokens": 400, "response_format": LONG, "n": 4}
    began = time.monotonic()
    ask(client, **options)
    seconds = time.monotonic() - began
    steps = statistics(handle).decode_steps
    stream = ask(client, stream=True, **options)
    next(iter(stream))
    stream.close()
    with suppress(openai.APITimeoutError):
        ask(client.with_options(timeout=seconds / 4), **options)
    eventually(lambda: idle(handle))
    assert statistics(handle).decode_steps - steps < 2 * 350, "both were aborted long before their end"


def test_what_vllm_does_not_measure_is_no_metric(client, endpoint):
    ask(client)

    def page():
        text = httpx.get(f"{endpoint.url}/metrics", timeout=60).text
        return text if "skipvision_engine_decode_steps" in text else None

    eventually(page)
    text = page()
    for name in ("running", "waiting", "kv_occupancy", "kv_bytes_used", "decode_tokens", "visual_total"):
        assert f"skipvision_engine_{name}{{" in text
    for name in UNMEASURED:
        assert f"skipvision_engine_{name}{{" not in text


def engine_processes():
    """The replica of the engine, and vLLM's processes in it."""
    replicas = [
        process
        for process in psutil.Process().children(recursive=True)
        if ":skipvision:engine-tiny" in "".join(process.cmdline()[:1])
    ]
    return replicas, [child for replica in replicas for child in replica.children(recursive=True)]


@pytest.mark.parametrize("which", ["engine", "replica"])
def test_an_engine_that_dies_is_replaced(client, endpoint, which):
    """A request that waits is answered by the next engine; a stream that has begun ends with an error."""
    (replica,), children = engine_processes()
    stream = ask(client, stream=True, max_completion_tokens=400, response_format=LONG)
    next(iter(stream))

    async def answer():
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="x", timeout=300) as one:
            return await one.chat.completions.create(model="red", messages=question(), max_tokens=3)

    for process in children if which == "engine" else [replica]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with pytest.raises(openai.APIError) as broken:
        list(stream)
    assert broken.value.code == "engine_died"
    eventually(lambda: httpx.get(f"{endpoint.url}/healthz", timeout=60).status_code == 200, 300)
    assert asyncio.run(answer()).choices
    _, alive = psutil.wait_procs([replica, *children], timeout=30)
    assert not alive, "nothing of the dead engine is left"
