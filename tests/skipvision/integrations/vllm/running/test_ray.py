"""Ray's own libraries for LLMs with the plug-in, by the code of the documentation."""

import base64
import io
import re
import socket

import openai
import pytest

from skipvision.loading import load_processor
from tests.conftest import ROOT
from tests.skipvision.integrations.vllm.running.conftest import QUESTION, TOKENS, TUNED, prompt

pytestmark = pytest.mark.usefixtures("local_ray")
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vllm.md").read_text(), flags=re.DOTALL)
ON_CPU = '"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4'


@pytest.fixture(scope="module")
def shared(exported, scenes, tmp_path_factory):
    """The folder that the code calls /shared."""
    root = tmp_path_factory.mktemp("shared")
    (root / "images").mkdir()
    for number, scene in enumerate(scenes):
        scene.save(root / "images" / f"{number}.png")
    (root / "runs").mkdir()
    (root / "runs" / "exported").symlink_to(exported)
    return root


@pytest.fixture
def run(shared):
    """Run the documented code that imports a library, with settings for a machine without GPUs."""

    def with_settings(library, bundle):
        (code,) = (code for code in CODE if library in code)
        for old, new in (
            ("/shared/", f"{shared}/"),
            ("engine_kwargs={", f"placement_group_config={bundle}, engine_kwargs={{{ON_CPU}, "),
        ):
            assert old in code
            code = code.replace(old, new)
        namespace = {"__name__": "__main__"}  # Ray pickles the functions of this module by value.
        exec(compile(code, "docs/vllm.md", "exec"), namespace)
        return namespace

    return with_settings


@pytest.fixture
def text(exported, engine_answers):
    """The beginning of our engine's answer for an image."""
    tokenizer = load_processor(exported).tokenizer

    def run(scene, **fields):
        (ids,) = engine_answers([(QUESTION, [scene], TUNED.model_copy(update=fields))])
        return tokenizer.decode(ids, skip_special_tokens=True)

    return run


def test_an_endpoint(run, scenes, text):
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        run("ray.serve.llm", {"bundles": [{"CPU": 1}]})
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        content = [image(scenes[0]), {"type": "text", "text": QUESTION}]

        def ask(skip=None):
            return client.chat.completions.create(
                model="tuned",
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=TOKENS,
                extra_body={} if skip is None else {"mm_processor_kwargs": {"skip": skip}},
            )

        tuned, pruned, full = ask(), ask({"retained": 100}), ask("full")
        assert full.usage.prompt_tokens - tuned.usage.prompt_tokens == 256 - TUNED.counts(256).total
        assert full.usage.prompt_tokens - pruned.usage.prompt_tokens == 256 - 101
        assert tuned.choices[0].message.content.strip() == text(scenes[0]).strip()
        assert pruned.choices[0].message.content.strip() == text(scenes[0], retained=100).strip()
        with pytest.raises(openai.BadRequestError, match="retained=-1"):
            ask({"retained": -1})
    finally:
        serve.shutdown()


def test_a_batch_job(run, scenes, text, exported):
    captions = run("ray.data.llm", {"bundle_per_worker": {"CPU": 1}})["captions"].take_all()
    rows = {row["path"].rpartition("/")[2]: row for row in captions}
    assert len(rows) == len(scenes)
    words = len(load_processor(exported).tokenizer(prompt(QUESTION, 0)).input_ids)
    for number, scene in enumerate(scenes):
        row = rows[f"{number}.png"]
        assert row["prompt_tokens"] == 101 + words
        assert row["caption"].strip().startswith(text(scene, retained=100).strip())


def image(scene):
    buffer = io.BytesIO()
    scene.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
