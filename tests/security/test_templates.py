"""A chat template of a model folder stays in its sandbox (CVE-2026-5760)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import skipvision as sv
from skipvision.engine import prepare
from skipvision.errors import InputError
from skipvision.loading import load_processor

ESCAPES = {
    "the class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the class by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "the class by an item": "{{ ''['__class__']['__mro__'] }}",
    "the class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "the class by a map": "{{ [''] | map(attribute='__class__') | list }}",
    "the globals of a helper": "{{ cycler.__init__.__globals__.os.system('touch ' ~ '{ran}') }}",
    "the globals of an error": "{{ raise_exception.__globals__['__builtins__'] }}",
    "the globals of the date": "{{ strftime_now.__globals__ }}",
    "the globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "the code of a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a lipsum": "{{ lipsum.__globals__['os'].system('touch ' ~ '{ran}') }}",
    "the configuration": "{{ self.__init__.__globals__ }}",
    "the namespace": "{{ namespace.__init__.__globals__ }}",
    "a joiner": "{{ joiner.__init__.__globals__.__builtins__.open('{ran}', 'w') }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update({'role': 'system'}) }}",
    "another file": "{% include '/etc/passwd' %}",
    "a file to import": "{% import '/etc/passwd' as x %}",
    "a file to extend": "{% extends '/etc/passwd' %}",
    "a range without end": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "a template that is broken": "{% for %}",
    "an error of its own": "{{ raise_exception('no') }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
"""Templates that try to leave the sandbox; {ran} is the path of a file that must not appear."""

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ESCAPES)
@pytest.mark.timeout(60)
def test_a_template_does_not_leave_its_sandbox(kind, folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "chat_template.jinja").write_text(ESCAPES[kind].replace("{ran}", str(ran)))
    processor = load_processor(folder)
    messages = [dict(CHAT[0])]
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    except Exception:
        with pytest.raises(InputError):
            prepare(processor, sv.Request(CHAT))
    else:
        assert not any(part in text for part in ("<class", "<function", "builtins", "root:", os.sep))
    assert not ran.exists()
    assert messages == CHAT


@pytest.mark.parametrize("kind", ESCAPES)
def test_the_message_about_a_template_holds_no_address(kind, folder):
    (folder / "chat_template.jinja").write_text(ESCAPES[kind])
    try:
        prepare(load_processor(folder), sv.Request(CHAT))
        message = ""
    except InputError as error:
        message = str(error)
    assert " at 0x" not in message
    assert "site-packages" not in message
    assert str(folder) not in message
