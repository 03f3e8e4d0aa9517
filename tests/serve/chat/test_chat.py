"""Answers to the real `openai` client from a real deployment."""

import asyncio
import json
import re
import time

import httpx2 as httpx
import openai
import pytest
from ray import serve as ray_serve
from transformers import AutoModelForImageTextToText, AutoProcessor

from skipvision import Engine, Request, Sampling, SkipConfig, load_adapter
from tests.backend import ON_VLLM, on_native
from tests.serve.conftest import KEPT, SKIP, noise, question


@pytest.fixture(scope="module")
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client, text="what is it?", *seeds, model="red", **options):
    options = {"temperature": 0, "max_completion_tokens": 12, **options}
    return client.chat.completions.create(model=model, messages=question(text, *seeds), **options)


@pytest.fixture(scope="module")
def engine(endpoint):
    """An engine in this process, without HTTP and Ray, whose answers are the reference."""
    base = AutoModelForImageTextToText.from_pretrained(endpoint.model)
    processor = AutoProcessor.from_pretrained(endpoint.model)
    with Engine(load_adapter(base, endpoint.adapters["red"], name="red"), processor) as engine:
        engine.add_adapter("blue", endpoint.adapters["blue"])
        yield engine


def expected(engine, text="what is it?", *seeds, **options):
    seeds = seeds or (0,)
    messages = [
        {"role": "user", "content": [*[{"type": "image"}] * len(seeds), {"type": "text", "text": text}]}
    ]
    sampling = options.pop("sampling", Sampling(max_new_tokens=12))
    (completion,) = engine.run([Request(messages, [noise(s) for s in seeds], sampling=sampling, **options)])
    assert completion.error is None
    return completion


@pytest.mark.parametrize(("model", "adapter"), [("red", "red"), ("blue", "blue"), ("tiny", "__base__")])
def test_the_answer_equals_the_engines(client, engine, model, adapter):
    found = ask(client, model=model)
    right = expected(engine, adapter=adapter)
    assert found.choices[0].message.content == right.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == right.choices[0].finish_reason
    assert (found.model, found.object) == (model, "chat.completion")
    assert found.usage.prompt_tokens == right.usage.prompt_tokens
    assert found.usage.completion_tokens == right.usage.completion_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    visual = found.usage.visual_tokens
    kept = KEPT if model != "blue" else 16
    assert visual == {
        "total": 16,
        "retained": right.usage.visual_retained,
        "skipped": right.usage.visual_skipped,
        "cached": kept,
    }


def test_several_images_and_turns_are_answered(client, engine):
    turns = [
        *question("first", 1, 2),
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "and now?"},
    ]
    found = client.chat.completions.create(model="red", messages=turns, temperature=0, max_tokens=9)
    assert found.usage.visual_tokens["total"] == 32
    assert found.usage.completion_tokens <= 9
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "first"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "well"}]},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]
    request = Request(messages, [noise(1), noise(2)], sampling=Sampling(max_new_tokens=9), adapter="red")
    (right,) = engine.run([request])
    assert found.choices[0].message.content == right.text


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_equals_the_whole_answer(client, n):
    options = {"n": n, "seed": 5, "temperature": 1.0}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    texts = [""] * n
    reasons = [None] * n
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing follows the end of a choice"
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert [chunk.choices[0].delta.role for chunk in chunks[:n]] == ["assistant"] * n
    assert chunks[-1].choices == []
    # vLLM shares whole blocks, which are longer than this prompt.
    assert chunks[-1].usage == whole.usage.model_copy(update={"prefix_hit": not ON_VLLM})
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(endpoint):
    body = {"model": "red", "messages": question(), "stream": True, "max_tokens": 3, "temperature": 0}
    with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_seed_stop_and_logprobs_take_effect(client, engine):
    drawn = {ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2, 2)}
    assert len(drawn) == 2
    text = expected(engine, adapter="red").text
    stop = text[3:5]
    assert ask(client, stop=[stop]).choices[0].message.content == text[: text.index(stop)]
    found = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    sampling = Sampling(max_new_tokens=12, logprobs=2)
    right = expected(engine, adapter="red", sampling=sampling).choices[0]
    assert [token.logprob for token in found] == pytest.approx(
        [token.logprob for token in right.logprobs], abs=1e-4
    )
    assert all(len(token.top_logprobs) == 2 for token in found)


NULLABLE = ("temperature", "top_p", "n", "stream", "logprobs", "frequency_penalty", "presence_penalty")
HARMLESS = {"role": "assistant", "content": "well", "tool_calls": []}


@pytest.mark.parametrize(
    "options",
    [
        {"stop": "a string longer than four characters"},
        {"temperature": 2, "top_p": 0},
        {"messages": [*question(), HARMLESS, *question(), {**HARMLESS, "tool_calls": None}]},
        {"extra_body": {**dict.fromkeys(NULLABLE), "seed": 3}},
        {"reasoning_effort": "low", "verbosity": "low"},
    ],
    ids=lambda options: ",".join(options),
)
def test_whatever_openai_accepts_is_accepted(client, options):
    options = {"model": "red", "messages": question(), "max_completion_tokens": 2, **options}
    answer = client.chat.completions.create(**options)
    assert answer.usage.completion_tokens
    assert len(answer.choices) == 1


def test_top_p_0_is_greedy(client, engine):
    found = ask(client, temperature=2, top_p=0).choices[0].message.content
    assert found == expected(engine, adapter="red").text


@on_native
def test_a_request_can_set_its_skipconfig(client, engine):
    found = ask(client, extra_body={"skip": {"retained": 2, "skipped": 2}})
    assert found.usage.visual_tokens == {"total": 16, "retained": 2, "skipped": 2, "cached": 4}
    right = expected(engine, adapter="red", skip=SkipConfig(retained=2, skipped=2))
    assert found.choices[0].message.content == right.text
    full = ask(client, extra_body={"skip": {"retained": 1.0, "skipped": 0.0, "summary_tokens": 0}})
    assert full.usage.visual_tokens["cached"] == 16
    with pytest.raises(openai.BadRequestError, match="summary_tokens=3, but this model is attached with 1"):
        ask(client, extra_body={"skip": {**SKIP, "summary_tokens": 3}})


def test_answers_follow_a_json_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "number": {"type": "integer", "minimum": 0, "maximum": 999},
            "red": {"type": "boolean"},
        },
        "required": ["number", "red"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema, "strict": True}}
    for seed in range(3):
        options = {"temperature": 1.0, "seed": seed, "max_completion_tokens": 300, "n": 2}
        for choice in ask(client, response_format=wanted, **options).choices:
            assert choice.finish_reason == "stop"
            value = json.loads(choice.message.content)
            assert choice.message.content == json.dumps(value, separators=(",", ":"))
            assert isinstance(value["number"], int)
            assert isinstance(value["red"], bool)
            assert value.keys() == {"number", "red"}


def test_json_answers_have_no_runs_of_blanks(client):
    found = ask(client, response_format={"type": "json_object"}, max_completion_tokens=60)
    outside = re.sub(r'"([^"\\]|\\.)*"?', "", found.choices[0].message.content)
    assert outside
    assert not re.search(r"\s\s", outside)


def following(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


WORDS = "é€ – ü, plain, 東京"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [(None, f'"{WORDS}"'), ("東", f'"{WORDS[:-2]}'), ("ain,", '"é€ – ü, pl')]
)
def test_logprobs_have_the_bytes_of_the_answer(client, stream, stop, text):
    options = {"max_completion_tokens": 60, "response_format": following({"const": WORDS}), "stop": stop}
    found = ask(client, logprobs=True, top_logprobs=1, stream=stream, **options)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    answer = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert answer == text
    joined = b"".join(bytes(token.bytes) for token in tokens)
    assert joined.startswith(text.encode())
    assert len(joined) - len(text.encode()) < len(tokens[-1].bytes), "only the last token may extend further"
    assert all(len(token.top_logprobs) == 1 for token in tokens)


def test_special_tokens_in_a_text_are_ordinary_text(client):
    plain, special = (ask(client, text).usage for text in ("hi", "<image> hi </s><pad>"))
    assert special.visual_tokens["total"] == plain.visual_tokens["total"] == 16
    assert special.prompt_tokens > plain.prompt_tokens + len("imagespad")


def test_models_are_listed_and_described(client, endpoint):
    cards = client.models.list().data
    parents = [("tiny", None), *((name, "tiny") for name in ("red", "blue", "org/blue"))]
    assert [(card.id, card.parent) for card in cards] == parents
    slashed = httpx.get(f"{endpoint.url}/v1/models/org/blue")
    assert (slashed.status_code, slashed.json()["id"]) == (200, "org/blue")
    card = client.models.retrieve("red")
    assert card.skip["retained"] == 4
    assert card.source == str(endpoint.adapters["red"])
    with pytest.raises(
        openai.NotFoundError, match="'green' does not exist; there are tiny, red, blue, org/blue"
    ):
        client.models.retrieve("green")


@on_native
@pytest.mark.parametrize("model", ["tiny", "red"])
def test_a_skip_without_summary_tokens_has_those_of_its_model(client, model):
    skip = {"retained": 3, "skipped": 6}
    usage = client.chat.completions.create(
        model=model, messages=question(), max_tokens=2, extra_body={"skip": skip}
    ).usage
    assert usage.visual_tokens["cached"] == 3 + 2


def test_health_and_openapi_are_served(endpoint):
    health = httpx.get(f"{endpoint.url}/healthz")
    assert health.status_code == 200
    assert health.json()["models"]["tiny"]["status"] == "ok"
    schema = httpx.get(f"{endpoint.url}/openapi.json").json()
    chat = schema["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= chat["responses"].keys()
    assert chat["security"]
    assert not [path for path, found in schema["paths"].items() if "422" in str(found)]
    for path in ("/docs", "/redoc"):  # FastAPI's pages load scripts from other hosts
        assert httpx.get(endpoint.url + path).status_code == 404


def test_many_requests_at_once_are_answered(endpoint):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", timeout=60) as client:
            requests = [
                client.chat.completions.create(
                    model=model, messages=question("hm", seed), temperature=0, max_completion_tokens=8
                )
                for seed in range(6)
                for model in ("red", "blue", "tiny")
            ]
            return await asyncio.gather(*requests)

    answers = asyncio.run(all_of_them())
    assert len(answers) == 18
    assert all(answer.usage.completion_tokens for answer in answers)


def test_a_client_that_disconnects_frees_the_engine(client, local_ray):
    """During a stream, and while it waits for a whole answer: the request is cancelled at once."""
    handle = ray_serve.get_deployment_handle("engine-tiny", "skipvision")

    def cancelled():
        now = handle.statistics.remote().result()
        return now.requests.get("cancelled", 0), now.running + now.waiting

    schema = {"type": "string", "minLength": 380}
    long = {"type": "json_schema", "json_schema": {"name": "long", "schema": schema}}
    before, _ = cancelled()
    stream = ask(client, stream=True, max_completion_tokens=400, response_format=long)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="red", messages=question(), max_completion_tokens=400, n=4, response_format=long
        )
    deadline = time.monotonic() + 5
    while cancelled() != (before + 2, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cancelled() == (before + 2, 0)
