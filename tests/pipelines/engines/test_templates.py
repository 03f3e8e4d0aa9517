"""Chat templates in a process of their own: the same texts, and an end to every one."""

import threading
import time
from types import SimpleNamespace

import pytest
from transformers import AutoProcessor

from pipelines.caption.rows import CaptionRow, Message
from pipelines.caption.stages import prepare_row
from pipelines.engines.templates import TemplateProcess
from skipvision.engine import Request, prepare
from skipvision.errors import InputError

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "be brief\n"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'what\'s "é" 🙂 \x85?'}]},
]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def process(template, seconds=0.5):
    tokenizer = SimpleNamespace(special_tokens_map={"bos_token": "<s>"})
    return TemplateProcess(SimpleNamespace(chat_template=template, tokenizer=tokenizer), seconds)


@pytest.fixture
def rendering():
    """Makes processes that end with the test."""
    made = []

    def make(*arguments, **options):
        made.append(process(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_texts_are_those_of_the_processor(tiny_model):
    processor = AutoProcessor.from_pretrained(tiny_model)
    template = TemplateProcess(processor)
    text = template.render(MESSAGES)
    template.close()
    assert text == processor.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    here = prepare(processor, Request(MESSAGES[:1])).inputs
    there = prepare(
        processor,
        Request(MESSAGES[:1]),
        processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, tokenize=False),
    ).inputs
    assert here["input_ids"].tolist() == there["input_ids"].tolist()


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set x = namespace(n=7) %}{% for i in range(99) %}{% set x.n = x.n * x.n %}{% endfor %}",
        "{{ (messages[0].role ~ '!' * 40) | replace('!', '!' * 9999) | length ** (10 ** 9) }}",
        "{% if messages[0].role == 'system' %}" + ENDLESS + "{% endif %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(template, rendering):
    one = rendering(template)
    with pytest.raises(InputError, match=r"does not end within 0\.5 s on these messages: shorten"):
        one.render(MESSAGES)
    begin = time.monotonic()
    with pytest.raises(InputError, match="does not end"):
        one.render(MESSAGES)
    assert time.monotonic() - begin < 10
    assert one.busy_seconds == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no system prompt') }}",
            r"rejects this request \(TemplateError: no system prompt\)",
        ),
        ("{{ broken", "TemplateSyntaxError"),
        ("{{ nothing.there }}", "UndefinedError"),
        ("{{ messages[0].role * 30000000 }}", "180,000,000 characters; at most"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_the_errors_of_a_template_are_reported(template, message, rendering):
    with pytest.raises(InputError, match=message):
        rendering(template, 30).render(MESSAGES)


def test_a_process_that_stopped_one_prompt_renders_the_next(rendering):
    one = rendering("{% if messages | length > 1 %}" + ENDLESS + "{% endif %}{{ bos_token }}fine")
    with pytest.raises(InputError, match="does not end"):
        one.render(MESSAGES)
    assert one.render(MESSAGES[1:]) == "<s>fine"


def test_a_killed_process_is_replaced(rendering):
    one = rendering("fine", 30)
    assert one.render(MESSAGES) == "fine"
    one._process.kill()
    one._process.wait()
    assert one.render(MESSAGES) == "fine"


def test_threads_share_a_process(rendering):
    one, texts = rendering("{{ messages[0].content }}", 30), {}

    def render(number):
        texts[number] = one.render([{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: str(number) for number in range(20)}


def test_a_row_whose_template_does_not_end_is_an_error_row(tiny_model, rendering):
    processor = AutoProcessor.from_pretrained(tiny_model)
    row = CaptionRow("a", "", (Message("user", "x"),))
    prepared = prepare_row(processor, 3, row, rendering(ENDLESS))
    assert prepared.problem.kind == "prompt"
    assert "does not end within 0.5 s" in prepared.problem.reason
