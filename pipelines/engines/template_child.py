"""The program of a `TemplateProcess`: it renders chat templates, and recovers if one does not end.

It is started as a file, so that it imports little: Jinja, and the sandbox in which transformers renders. A
child of this program renders, and is replaced when it dies, which takes milliseconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

_MAX_MEMORY = 2**30
"""Memory that rendering may take (bytes)."""

_MAX_TEXT = 2**24
"""Max length of a rendered text (characters)."""


def main() -> None:
    """Answer each line of standard input, messages as JSON, with one line of standard output.

    The first line holds the settings. A rendered prompt is ``{"text": …}``; the template's error is
    ``{"error": …}``; the death of the child that rendered is ``{"died": exit code}``.
    """
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Ray's workers ignore the ends of their children, and pass that on.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    from transformers.utils import chat_template_utils  # noqa: F401  the children need it

    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:  # leaves the next line
        settings = json.loads(unbuffered.readline())
    while True:
        child = os.fork()
        if child == 0:
            _limit_memory()
            _render_lines(settings, answers)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        _write(answers, {"died": code})


def _render_lines(settings: dict[str, Any], answers: TextIO) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for line in sys.stdin:
        # The signal's default action ends the process, whatever code it runs.
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        answer: dict[str, Any]
        try:
            rendered: Any = render_jinja_template(
                [json.loads(line)],
                chat_template=settings["template"],
                add_generation_prompt=True,
                **settings["variables"],
            )
            texts = rendered[0]
            answer = {"text": texts[0]} if len(texts[0]) <= _MAX_TEXT else {"error": _too_long(texts[0])}
        except MemoryError:
            answer = {"error": f"MemoryError: more than {_MAX_MEMORY:,} bytes"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:10_000]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, answer)


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _too_long(text: str) -> str:
    return f"a text of {len(text):,} characters; at most {_MAX_TEXT:,} are allowed"


def _limit_memory() -> None:
    with suppress(OSError, ValueError):  # not on every system
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
