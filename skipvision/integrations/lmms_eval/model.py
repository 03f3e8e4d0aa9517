"""lmms-eval's model class. Only lmms-eval imports this module, so lmms-eval is installed then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from skipvision.errors import GenerationError, InputError
from skipvision.integrations.lmms_eval.answering import Question, answer, load_engine


class SkipVision(lmms):  # type: ignore[misc]
    """A vision-language model with Skip-Vision. ``--model_args`` are the arguments of `load_engine`.

    ``--batch_size`` is the max number of answers that are generated at once. It runs in one process.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        max_sequences = int(max_batch_size or 16) if batch_size == "auto" else int(batch_size)
        self.engine = load_engine(
            pretrained, adapter, device=device or "auto", max_sequences=max_sequences, **settings
        )

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return the answers in the order of the requests.

        Raises:
            InputError: a request has something else than images.
            GenerationError: a request failed; the message names its document and the reason.
        """
        arguments = [request.args for request in requests]
        completions = answer(self.engine, self._questions(arguments))
        results = []
        for number, (context, generation, _, doc, task, _) in enumerate(arguments):
            completion = completions[number]
            if completion.error is not None:
                raise GenerationError(f"document {doc} of {task} failed: {completion.error}")
            usage = completion.usage
            counts = TokenCounts(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens)
            text = completion.text.strip()
            self.cache_hook.add_partial("generate_until", (context, generation), text)
            results.append(GenerationResult(text=text, token_counts=counts))
        return results

    def _questions(self, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Question]:
        """Yield one question at a time, so that images are only loaded when the engine has room."""
        for context, generation, visuals_of, doc, task, split in arguments:
            visuals = visuals_of(self.task_dict[task][split][doc]) or []
            others = [visual for visual in visuals if not hasattr(visual, "convert")]
            if others:
                raise InputError(
                    f"document {doc} of {task} has a {type(others[0]).__name__}: only images are supported"
                )
            yield Question(context, [visual.convert("RGB") for visual in visuals], generation)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError: the engine reports no log likelihood of a given answer."""
        raise NotImplementedError(
            "log likelihoods are not supported: choose tasks with output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: each request is one round."""
        raise NotImplementedError("tasks of several rounds are not supported: choose other tasks")
