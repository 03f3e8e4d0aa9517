"""The judge: a language model that reads answers which no rule can read.

Its replies are kept in a file, so that no prompt is sent twice, not even by a job that is started again.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pipelines.score.rules.judge_endpoint import JudgeConfig, JudgeEndpoint, NoVerdictError
from pipelines.score.rules.multiple_choice import chosen_option

_ATTEMPTS = 3
_WARMER = 0.5
_NONE_OF_THEM = {"Z": "none of them"}

_SCORE = re.compile(
    r"(?i)[\s*_`|]*(?:(?:correctness|(?:correctness )?score)[\s*_`]*:)?[\s*_`]*"
    r"(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)[\s*_`|]*\.?[\s*_`|]*"
)
"""A reply that consists of a number from 0 to 1, with or without a label and Markdown marks."""

Parsed = TypeVar("Parsed")

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


class UnreadableReply(NoVerdictError):
    """No reply of the judge had the requested form, in several attempts."""


class Judge:
    """Sends prompts to grade an answer, choose an option, or extract a final answer.

    Several threads may share it.
    """

    def __init__(self, config: JudgeConfig, memory: Path) -> None:
        """Read the replies kept in ``memory``, a file of JSON lines to which new ones are appended.

        Raises:
            ConfigError: the environment variable of the API key is not set.
        """
        self._model, self._memory = config.model, memory
        self._endpoint = JudgeEndpoint(config)
        self._lock = threading.Lock()
        self._replies = self._read_memory()

    def grade(self, question: str, gold: str, answer: str) -> float:
        """Return how right an answer is, 0 … 1.

        Source: MM-Vet (arXiv 2308.02490), "LLM-based evaluation", with its prompt without the two long
        examples.

        Raises:
            JudgeError: the judge cannot be reached.
            RefusedPrompt: its endpoint rejects the prompt.
            UnreadableReply: no reply is a number from 0 to 1 alone.
        """

        def score(reply: str) -> float | None:
            match = _SCORE.fullmatch(reply)
            return None if match is None else float(match[1])

        gold = gold.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        prompt = _GRADE.format(question=_one_line(question), gold=_one_line(gold), answer=_one_line(answer))
        return self._prompt(prompt, score, "a score from 0 to 1")

    def choose(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """Return the letter of the option that an answer means; None if it means none of them.

        Source: MMBench (arXiv 2307.06281), "ChatGPT-involved choice extraction", its second step.

        Raises:
            JudgeError: the judge cannot be reached.
            RefusedPrompt: its endpoint rejects the prompt.
            UnreadableReply: no reply names an option, or says that it is none of them.
        """
        possible = {**_NONE_OF_THEM, **options}
        listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
        prompt = _CHOOSE.format(question=question, options=listed, answer=answer)
        chosen = self._prompt(prompt, lambda reply: chosen_option(reply, possible), "the letter of an option")
        return chosen if chosen in options else None

    def extract(self, question: str, answer: str) -> str:
        """Return the final answer that a long one contains.

        Source: MathVista (arXiv 2310.02255), "Evaluation protocols", answer extraction.

        Raises:
            JudgeError: the judge cannot be reached.
            RefusedPrompt: its endpoint rejects the prompt.
            UnreadableReply: all replies are empty.
        """
        prompt = _EXTRACT.format(question=question, answer=answer)
        return self._prompt(prompt, lambda reply: reply or None, "the final answer in another one")

    def _prompt(self, prompt: str, parse: Callable[[str], Parsed | None], wanted: str) -> Parsed:
        """Return the parsed reply to a prompt, from the memory if it has one.

        A reply that does not parse is not kept. The prompt is then sent again at a higher temperature, as
        VLMEvalKit does.
        """
        key = hashlib.blake2b(f"{self._model}\n{prompt}".encode(), digest_size=16).hexdigest()
        if key in self._replies and (known := parse(self._replies[key])) is not None:
            return known
        for attempt in range(_ATTEMPTS):
            reply = self._endpoint.reply(prompt, warmer=attempt * _WARMER)
            if (parsed := parse(reply)) is not None:
                with self._lock, self._memory.open("a", encoding="utf-8") as file:
                    self._replies[key] = reply
                    file.write(json.dumps({"prompt": key, "reply": reply}) + "\n")
                return parsed
        raise UnreadableReply(
            f"the judge {self._model} was prompted {_ATTEMPTS} times for {wanted} and replied {reply!r}"
        )

    def _read_memory(self) -> dict[str, str]:
        if not self._memory.exists():
            return {}
        replies = {}
        for line in self._memory.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the job was killed while it wrote this line
                continue
            replies[entry["prompt"]] = entry["reply"]
        return replies


def _one_line(text: str) -> str:
    return " ".join(text.split())
