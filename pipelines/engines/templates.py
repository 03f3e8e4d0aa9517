"""Render chat templates in a process of their own, which is killed if a template does not end.

A chat template is a program that comes with a model. Nothing in the sandbox limits its time, and a thread
that renders it can be neither stopped nor, during one long operation, prevented from holding the interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from skipvision.errors import InputError

TEMPLATE_SECONDS = 5.0
"""Default limit on rendering one prompt, which usually takes less than a millisecond (s)."""

_PROGRAM = Path(__file__).with_name("template_child.py")


class TemplateProcess:
    """Renders one model's chat template. Threads may share it; it renders one prompt at a time.

    The process starts at once, and again after it was killed. It ends with this object.

    Args:
        processor: the model's processor.
        seconds: limit on rendering one prompt (s).
    """

    def __init__(self, processor: Any, seconds: float = TEMPLATE_SECONDS) -> None:
        template = getattr(processor, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        tokenizer = getattr(processor, "tokenizer", None)
        special = {} if tokenizer is None else tokenizer.special_tokens_map
        variables = {name: _plain(value) for name, value in special.items()}
        self._settings = {"template": template, "variables": variables, "seconds": seconds}
        self._seconds = seconds
        self._lock = threading.Lock()
        self._begin: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self._end: Any = None
        if self.exists:
            self._start()

    @property
    def exists(self) -> bool:
        """Whether the model has a chat template. If not, its processor raises the error."""
        return isinstance(self._settings["template"], str)

    @property
    def busy_seconds(self) -> float:
        """How long the prompt that is being rendered has taken so far; 0 if there is none (s)."""
        begin = self._begin
        return 0.0 if begin is None else time.monotonic() - begin

    def render(self, messages: Sequence[Any]) -> str:
        """Return the text of messages with the beginning of an answer.

        Raises:
            InputError: the template refuses the messages, does not end, or takes too much memory.
        """
        given = [{name: value for name, value in each.items() if value is not None} for each in messages]
        line = json.dumps(given)
        with self._lock:
            self._begin = time.monotonic()
            try:
                answer = self._ask(line)
            finally:
                self._begin = None
        if "text" in answer:
            return str(answer["text"])
        if "error" in answer:
            raise InputError(f"the processor rejects this request ({answer['error']})")
        if answer["died"] == -signal.SIGALRM:
            ending = f"does not end within {self._seconds:g} s"
        else:
            ending = f"ends its process (exit code {answer['died']})"
        raise InputError(
            f"the chat template of this model {ending} on these messages: shorten them, or use another model"
        )

    def close(self) -> None:
        """End the process that renders templates."""
        if self._end is not None:
            self._end()
        self._process = None

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        reply = ""
        with suppress(OSError):  # it dies
            _send(process, line)
            reply = process.stdout.readline() if process.stdout else ""
        if not reply.endswith("\n"):
            return {"died": process.wait()}
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            process_group=0,  # Ctrl-C in a terminal reaches only the program, which then ends this process
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        with suppress(OSError):  # it has died; `_ask` reports how
            _send(process, json.dumps(self._settings))
        return process


def _send(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is not None:  # not with print(), which Ray Serve sends to its log whatever the file
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _plain(value: Any) -> Any:
    """Return a special token, or several, without the type `AddedToken`."""
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else str(value)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # and its child
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # it had not read all of its input
                pipe.close()
    process.wait()
