"""A language model that reads answers, behind any endpoint that speaks OpenAI's chat completions.

What it said is kept in a file, so that nothing is asked twice, also by a job that is started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from pipelines.score.rules.multiple_choice import chosen_option
from skipvision.errors import ConfigError, SkipVisionError

_PAUSES = (1.0, 4.0, 15.0)
_LONGEST_PAUSE = 120.0
_WORTH_ANOTHER_TRY = frozenset({408, 409, 429, 500, 502, 503, 504})
_REFUSED = frozenset({400, 413, 422})
"""What an endpoint says of one prompt: too long, or against its rules."""
_READINGS = 3
_WARMER = 0.5
_NONE_OF_THEM = {"Z": "none of them"}

_SCORE = re.compile(
    r"(?i)[\s*_`|]*(?:(?:correctness|(?:correctness )?score)[\s*_`]*:)?[\s*_`]*"
    r"(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)[\s*_`|]*\.?[\s*_`|]*"
)
"""A reply that is nothing but a number from 0 to 1, its label, and marks of Markdown."""

Read = TypeVar("Read")

_GRADE = """\
Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. \
<AND> in the ground truth means it is totally right only when all elements in the ground truth are present \
in the prediction, and <OR> means it is totally right when any one element in the ground truth is present \
in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, \
0.9, or 1.0 (totally right). Just complete the last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{question} | {gold} | {answer} | """

_CHOOSE = """\
A question has the options below, and somebody answered it. Which option has the meaning of the answer? \
Reply with the letter of that option alone, or with Z if the answer has the meaning of none of them.

Question: {question}
Options:
{options}
Answer: {answer}
Letter:"""

_EXTRACT = """\
Somebody answered a question. Reply with the final answer alone, in the form that the question asks for: a \
letter, an integer, a decimal number, a Python list, or a short text.

{question}

Response: {answer}
Final answer:"""


class JudgeError(SkipVisionError):
    """The judge cannot be reached; the same job, run again, goes on."""


class NoVerdictError(SkipVisionError):
    """The judge says nothing about one answer; others it may judge."""


class UnreadableReply(NoVerdictError):
    """The judge was asked several times and never gave a reply of the form that was asked for."""


class RefusedPrompt(NoVerdictError):
    """The judge's endpoint does not take the prompt."""


class JudgeConfig(BaseModel):
    """The model that reads answers which no rule can read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(
        "https://api.openai.com/v1",
        pattern="^https?://",
        description="endpoint with OpenAI's API; /chat/completions is added",
    )
    model: str = Field(description="its name there; scores of different judges cannot be compared")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="environment variable that holds the API key; null = none is sent"
    )
    temperature: float | None = Field(
        0.0,
        ge=0,
        description="of its replies; null = none is sent, for models that refuse the setting",
    )
    parallel: int = Field(8, ge=1, description="questions asked at once")
    timeout: float = Field(60.0, gt=0, description="seconds an answer may take")


class Judge:
    """Asks, and remembers in ``memory``, a file of JSON lines. May be used by several threads."""

    def __init__(self, config: JudgeConfig, memory: Path) -> None:
        """Raises `ConfigError` if the environment variable for the API key is not set."""
        self._config, self._memory = config, memory
        self._lock = threading.Lock()
        self._headers = {"Content-Type": "application/json"}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ConfigError(
                    f"judge.api_key_env = {config.api_key_env}: there is no such environment variable; set "
                    "it to the API key, or set judge.api_key_env to null if the endpoint needs none"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        self._known = self._remembered()

    def grade(self, question: str, gold: str, answer: str) -> float:
        """How right an answer is, 0 … 1.

        Source: MM-Vet (arXiv 2308.02490), "LLM-based evaluation", with its prompt less the two long examples.

        Raises:
            JudgeError: it cannot be reached.
            RefusedPrompt: it does not take the prompt.
            UnreadableReply: no reply is a number from 0 to 1 alone.
        """

        def score(reply: str) -> float | None:
            found = _SCORE.fullmatch(reply)
            return None if found is None else float(found[1])

        gold = gold.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = _GRADE.format(question=_line(question), gold=_line(gold), answer=_line(answer))
        return self._ask(prompt, score, "a score from 0 to 1")

    def choose(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """The option that an answer means; None for none.

        Source: MMBench (arXiv 2307.06281), "ChatGPT-involved choice extraction", its second step.

        Raises:
            JudgeError: it cannot be reached.
            RefusedPrompt: it does not take the prompt.
            UnreadableReply: no reply names an option, or that it is none of them.
        """
        possible = {**_NONE_OF_THEM, **options}
        listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        prompt = _CHOOSE.format(question=question, options=listed, answer=answer)
        chosen = self._ask(prompt, lambda reply: chosen_option(reply, possible), "the letter of an option")
        return chosen if chosen in options else None

    def extract(self, question: str, answer: str) -> str:
        """The final answer in a long one.

        Source: MathVista (arXiv 2310.02255), "Evaluation protocols", answer extraction.

        Raises:
            JudgeError: it cannot be reached.
            RefusedPrompt: it does not take the prompt.
            UnreadableReply: all replies are empty.
        """
        prompt = _EXTRACT.format(question=question, answer=answer)
        return self._ask(prompt, lambda reply: reply or None, "the final answer in another one")

    def _ask(self, prompt: str, read: Callable[[str], Read | None], wanted: str) -> Read:
        """What ``read`` makes of the reply to a prompt, now or when it was asked before.

        A reply that it makes None of is not remembered: the judge is asked again, each time warmer, as
        VLMEvalKit does.
        """
        name = hashlib.blake2b(f"{self._config.model}\n{prompt}".encode(), digest_size=16).hexdigest()
        if name in self._known and (known := read(self._known[name])) is not None:
            return known
        for reading in range(_READINGS):
            reply = self._fetch(prompt, reading * _WARMER)
            if (found := read(reply)) is not None:
                with self._lock, self._memory.open("a", encoding="utf-8") as file:
                    self._known[name] = reply
                    file.write(json.dumps({"prompt": name, "reply": reply}) + "\n")
                return found
        raise UnreadableReply(
            f"the judge {self._config.model} was asked {_READINGS} times for {wanted} and said {reply!r}"
        )

    def _remembered(self) -> dict[str, str]:
        if not self._memory.exists():
            return {}
        known = {}
        for line in self._memory.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the job was killed while it wrote this line
                continue
            known[entry["prompt"]] = entry["reply"]
        return known

    def _fetch(self, prompt: str, warmer: float) -> str:
        url = f"{self._config.base_url.rstrip('/')}/chat/completions"
        asked: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if self._config.temperature is not None:
            asked["temperature"] = self._config.temperature + warmer
        body = json.dumps(asked).encode()
        request = urllib.request.Request(url, body, self._headers)  # noqa: S310 — http or https by the config
        for pause in (*_PAUSES, None):
            wanted = 0.0
            try:
                with urllib.request.urlopen(request, timeout=self._config.timeout) as response:  # noqa: S310
                    return _content(json.load(response))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code in _REFUSED:
                    raise RefusedPrompt(
                        f"the judge {self._config.model} at {url} does not take the prompt: {problem}"
                    ) from None
                if error.code not in _WORTH_ANOTHER_TRY:
                    break
                wanted = _retry_after(error.headers.get("Retry-After"))
            except (OSError, HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if pause is not None:
                time.sleep(max(pause, min(wanted, _LONGEST_PAUSE)))
        raise JudgeError(
            f"the judge {self._config.model} at {url} does not answer: {problem}\n"
            "What it has said so far is kept; run the same job again to continue"
        )


def _content(reply: Any) -> str:
    try:
        return str(reply["choices"][0]["message"]["content"] or "").strip()
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {str(reply)[:300]}") from None


def _retry_after(header: str | None) -> float:
    """Seconds that an endpoint asks to wait, which it may give as a date; 0 if it does not say."""
    if header is None:
        return 0.0
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0


def _line(text: str) -> str:
    return " ".join(text.split())
