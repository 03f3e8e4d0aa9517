"""The judge, called over a real HTTP server that plays OpenAI's endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.score import job as score
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import read_dataset
from pipelines.score.job import run_score
from pipelines.score.points import Prediction, score_answers
from pipelines.score.rules import judge_endpoint
from pipelines.score.rules.judge import Judge, UnreadableReply
from pipelines.score.rules.judge_endpoint import JudgeConfig, JudgeError
from skipvision.errors import ConfigError, DataError
from tests.pipelines.score.tables import CHOICE, VISTA, png, table

Reply = Callable[[str], tuple[int, object]]


class Endpoint:
    """Answers prompts by ``reply``, which tests replace.

    ``received`` holds the (path, key, prompt) of each request and ``temperatures`` its temperature;
    ``headers`` are sent back.
    """

    def __init__(self) -> None:
        self.received: list[tuple[str, str | None, str]] = []
        self.temperatures: list[float | None] = []
        self.headers: dict[str, str] = {}
        self.reply: Reply = lambda prompt: (200, "0.5")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                endpoint.received.append((self.path, self.headers["Authorization"], prompt))
                endpoint.temperatures.append(body.get("temperature"))
                status, text = endpoint.reply(prompt)
                content = {"choices": [{"message": {"content": text}}]} if isinstance(text, str) else text
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judge_endpoint, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.02,))
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join()


def judge(endpoint: Endpoint, memory: Path) -> Judge:
    return Judge(JudgeConfig(base_url=endpoint.url, model="j", api_key_env="JUDGE_KEY"), memory)


def test_mmvet_is_graded_and_no_prompt_is_sent_twice(endpoint, tmp_path):
    row = {"question": "What is x?", "answer": "-1<AND>-5", "category": "ocr,math"}
    rows = [{"index": n, "image": png(n), **row} for n in range(4)]
    dataset = read_dataset("MMVet", str(table(tmp_path / "table.tsv", rows)))
    answers = {str(n): Prediction(f"x = {n}") for n in range(4)}
    endpoint.reply = lambda prompt: (200, "1.0" if "x = 1 |" in prompt.splitlines()[-1] else "Score: 0.5")
    scored = score_answers(dataset, answers, "full", judge(endpoint, tmp_path / "memory"), parallel=3)
    assert [item.score for item in scored.items] == [0.5, 1.0, 0.5, 0.5]
    path, key, prompt = endpoint.received[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert "What is x? | -1 <AND> -5 | x = " in prompt
    with (tmp_path / "memory").open("a") as file:
        file.write('{"prompt": "half a li')  # killed while it wrote
    again = score_answers(dataset, answers, "skip", judge(endpoint, tmp_path / "memory"), parallel=3)
    assert [item.score for item in again.items] == [0.5, 1.0, 0.5, 0.5]
    assert len(endpoint.received) == 4


@pytest.mark.parametrize(("reply", "points"), [("B", 1), ("Z", 0), ("A.", 0)])
def test_the_judge_finds_the_option_that_no_rule_finds(endpoint, reply, points, tmp_path):
    row = {"index": 1, "image": png(), **CHOICE, "B": "z"}  # the judge's Z is not this text
    dataset = read_dataset("MMStar", str(table(tmp_path / "t.tsv", [row])))
    endpoint.reply = lambda prompt: (200, reply)
    answers = {"1": Prediction("It barks")}
    (item,) = score_answers(dataset, answers, "full", judge(endpoint, tmp_path / "memory")).items
    assert item.score == points
    (item,) = score_answers(
        dataset, {"1": Prediction("B")}, "full", judge(endpoint, tmp_path / "memory")
    ).items
    assert item.score == len(endpoint.received) == 1


def test_the_judge_extracts_the_answers_of_mathvista(endpoint, tmp_path):
    row = {**VISTA, "question_type": "free_form", "answer_type": "integer", "answer": "14"}
    dataset = read_dataset(
        "MathVista_MINI", str(table(tmp_path / "t.tsv", [{"index": 1, "image": png(), **row}]))
    )
    endpoint.reply = lambda prompt: (200, "14")
    answers = {"1": Prediction("Fourteen, as 7 + 7 shows")}
    (item,) = score_answers(dataset, answers, "full", judge(endpoint, tmp_path / "memory")).items
    assert item.score == 1
    (item,) = score_answers(
        dataset, {"1": Prediction("")}, "full", judge(endpoint, tmp_path / "memory")
    ).items
    assert (item.score, item.error, len(endpoint.received)) == (0, None, 1)


@pytest.mark.parametrize(
    ("replies", "error", "requests"),
    [
        ([(500, "x"), (200, "0.5")], None, 2),
        ([(500, "x")] * 3, "HTTP 500", 3),
        ([(401, {"error": "no"})], "HTTP 401.*no.*\n.*run the same job again", 1),
        ([(200, {"error": "odd"})] * 3, "no chat completion", 3),
    ],
)
def test_failures_are_retried_or_raised(endpoint, replies, error, requests, tmp_path):
    left = iter(replies)
    endpoint.reply = lambda prompt: next(left)
    judging = judge(endpoint, tmp_path / "memory")
    if error is None:
        assert judging.grade("q", "g", "a") == 0.5
    else:
        with pytest.raises(JudgeError, match=error):
            judging.grade("q", "g", "a")
    assert len(endpoint.received) == requests


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("0.5", 0.5),
        ("1", 1),
        (" **Score:** 0.3", 0.3),
        ("correctness score: 1.00", 1),
        ("Correctness: .7.", 0.7),
        ("| `0.0` |", 0),
        ("1 of the 2 elements is there: 0.5", None),
        ("-1", None),
        ("1/2", None),
        ("1.5", None),
        ("score: 0.5 or 0.6", None),
        ("10", None),
    ],
)
def test_a_score_is_a_number_and_nothing_else(endpoint, reply, points, tmp_path):
    endpoint.reply = lambda prompt: (200, reply)
    judging = judge(endpoint, tmp_path / "memory")
    if points is None:
        with pytest.raises(UnreadableReply):
            judging.grade("q", "g", "a")
    else:
        assert judging.grade("q", "g", "a") == points
    assert len(endpoint.received) == (3 if points is None else 1)


@pytest.mark.parametrize("unreadable", ["fine", "7", ""])
def test_an_unreadable_reply_is_not_kept(endpoint, unreadable, tmp_path):
    judging = judge(endpoint, tmp_path / "memory")
    replies = iter([unreadable, "0.5", *[unreadable] * 3, "1.0"])
    endpoint.reply = lambda prompt: (200, next(replies))
    assert judging.grade("q", "g", "a") == 0.5
    with pytest.raises(UnreadableReply, match=f"3 times for a score from 0 to 1 and replied '{unreadable}'"):
        judging.grade("q", "g", "b")
    assert endpoint.temperatures == [0.0, 0.5, 0.0, 0.5, 1.0]
    again = judge(endpoint, tmp_path / "memory")
    assert (again.grade("q", "g", "a"), again.grade("q", "g", "b")) == (0.5, 1.0)
    assert len(endpoint.received) == 6


def test_an_unreadable_reply_is_an_error_of_its_item(endpoint, tmp_path):
    row = {"question": "What is x?", "answer": "5", "category": "math"}
    file = table(tmp_path / "table.tsv", [{"index": n, "image": png(n), **row} for n in range(2)])
    endpoint.reply = lambda prompt: (200, "fine" if "x = 1 |" in prompt.splitlines()[-1] else "0.5")
    answers = {str(n): Prediction(f"x = {n}") for n in range(2)}
    dataset = read_dataset("MMVet", str(file))
    first, second = score_answers(dataset, answers, "full", judge(endpoint, tmp_path / "memory"), 2).items
    assert (first.score, first.error) == (0.5, None)
    assert (second.score, second.prediction) == (0, "x = 1")
    assert second.error.startswith("judge: the judge j was prompted 3 times")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_prompt_is_an_error_of_its_item(endpoint, status, tmp_path):
    row = {"question": "What is x?", "answer": "5", "category": "math"}
    file = table(tmp_path / "table.tsv", [{"index": n, "image": png(n), **row} for n in range(4)])
    dataset = read_dataset("MMVet", str(file))
    answers = {str(n): Prediction(f"x = {n}") for n in range(4)}
    endpoint.reply = lambda prompt: (
        (status, {"error": "too long"}) if "x = 1 |" in prompt.splitlines()[-1] else (200, "0.5")
    )
    judging = judge(endpoint, tmp_path / "memory")
    items = score_answers(dataset, answers, "full", judging, max_error_fraction=0.25).items
    assert [item.score for item in items] == [0.5, 0, 0.5, 0.5]
    assert f"does not take the prompt: HTTP {status}: " in items[1].error
    assert len(endpoint.received) == 4


def test_a_judge_that_refuses_everything_stops_the_job_and_keeps_its_replies(
    endpoint, tiny_model, tmp_path, monkeypatch
):
    """All questions of the job are answered already."""
    row = {"question": "What is x?", "answer": "5", "category": "math"}
    file = table(tmp_path / "table.tsv", [{"index": n, "image": png(n), **row} for n in range(8)])
    answers = {str(n): Prediction(f"x = {n}") for n in range(8)}
    monkeypatch.setattr(score, "_answer_missing", lambda job, ray: job.folder.answers.mkdir(exist_ok=True))
    monkeypatch.setattr(score, "_predictions", lambda captioning: answers)
    config = ScoreConfig.model_validate(
        {
            "name": "judged",
            "storage": str(tmp_path),
            "systems": {"full": {"model": {"path": str(tiny_model)}}},
            "datasets": [{"name": "MMVet", "path": str(file)}],
            "judge": {"base_url": endpoint.url, "model": "j", "api_key_env": "JUDGE_KEY", "parallel": 1},
            "max_error_fraction": 0.25,
        }
    )
    endpoint.reply = lambda prompt: (200, "0.5") if len(endpoint.received) <= 2 else (400, {"error": "no"})
    with pytest.raises(
        DataError,
        match=r"3 of 8 rows are errors \(3 × judge\); for example MMVet 4: .*HTTP 400.*raise the limit",
    ):
        run_score(config)
    sent = len(endpoint.received)
    assert sent < 8
    endpoint.reply = lambda prompt: (200, "1.0")
    assert run_score(config)["score"] == {"full": {"MMVet": 0.875}}
    assert len(endpoint.received) == sent + 6
    monkeypatch.delenv("JUDGE_KEY")
    assert run_score(config)["already_finished"]


def test_neither_key_nor_temperature_is_sent_where_the_settings_are_null(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not for this endpoint")
    settings = {"base_url": endpoint.url, "model": "j", "api_key_env": None, "temperature": None}
    assert Judge(JudgeConfig.model_validate(settings), tmp_path / "memory").grade("q", "g", "a") == 0.5
    assert endpoint.temperatures == [None]
    assert [key for _, key, _ in endpoint.received] == [None]


@pytest.mark.parametrize(
    ("header", "waited"),
    [
        ("7", 7.0),
        ("1e9", judge_endpoint._LONGEST_PAUSE),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", 0.0),
    ],
)
def test_the_header_retry_after_is_obeyed(endpoint, header, waited, tmp_path, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(judge_endpoint.time, "sleep", pauses.append)
    endpoint.headers = {"Retry-After": header}
    endpoint.reply = lambda prompt: (429, "x") if not pauses else (200, "0.5")
    assert judge(endpoint, tmp_path / "memory").grade("q", "g", "a") == 0.5
    assert pauses == [waited]


def test_a_missing_key_is_reported_first(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_KEY: this environment variable is not set"):
        Judge(JudgeConfig(model="j", api_key_env="NO_KEY"), tmp_path / "memory")
