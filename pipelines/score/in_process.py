"""Score a dataset with an engine in this process: no Ray, no files, any number of SkipConfigs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pipelines.data.images import ImageError
from pipelines.data.special_tokens import special_tokens_of
from pipelines.evaluation.answering import log_probability, request_for
from pipelines.score.dataset import Dataset
from pipelines.score.points import Prediction, Scored, score_answers
from pipelines.score.rules.judge import Judge
from skipvision.config import SkipConfig
from skipvision.engine import Engine, Request, Sampling
from skipvision.errors import ConfigError


def score_dataset(
    engine: Engine,
    dataset: Dataset,
    skip: SkipConfig | Literal["full"] | None,
    *,
    system: str,
    adapter: str | None = None,
    max_new_tokens: int = 64,
    judge: Judge | None = None,
) -> Scored:
    """Answer every question greedily and score the answers.

    Args:
        engine: holds the model and any number of adapters. Its state does not change.
        dataset: the questions.
        skip: the SkipConfig, with as many summary tokens as the engine was created with, or none; "full" = no
            skipping, None = the SkipConfig of the adapter or the engine.
        system: the label of the items.
        adapter: its name in the engine; None = the adapter that was active when the engine was created.
        max_new_tokens: the longest answer, in tokens.
        judge: reads answers that no rule can read.

    Raises:
        ConfigError: the engine cannot run under ``skip``.
        JudgeError: the judge cannot be reached.
    """
    predictions: dict[str, Prediction] = {}
    sampling = Sampling(max_new_tokens=max_new_tokens, logprobs=0)

    def requests() -> Iterator[Request]:
        for question in dataset.questions:
            if question.problem is not None:
                continue
            try:
                request = request_for(question.messages, question.images, engine.processor, sampling)
            except ImageError as error:
                predictions[question.index] = Prediction(error=f"{error.kind}: {error}")
            else:
                yield replace(request, skip=skip, adapter=adapter, key=question.index)

    for completion in engine.run(requests()):
        if isinstance(completion.error, ConfigError):  # every other question would fail in the same way
            raise completion.error
        if completion.error is not None or not completion.choices:
            predictions[completion.key] = Prediction(error=f"generation: {completion.error}")
        else:
            text = special_tokens_of(engine.processor).unescape(completion.text)
            probability = log_probability(completion)
            predictions[completion.key] = Prediction(text.strip(), log_probability=probability)
    return score_answers(dataset, predictions, system, judge)
