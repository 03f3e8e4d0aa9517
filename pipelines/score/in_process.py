"""A dataset asked of a model in this process: no Ray, no files, any number of SkipConfigs on one engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pipelines.data.chat import content_parts
from pipelines.data.images import ImageError
from pipelines.score.dataset import Dataset
from pipelines.score.points import Answered, Scored, score_answers
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
    """Ask every question greedily and score the answers.

    Args:
        engine: with the model; it may hold several adapters, and is left as it was.
        dataset: the questions.
        skip: how visual tokens are skipped, with as many summary tokens as the engine was made with, or none;
            "full" = not at all, None = as the adapter or the engine says.
        system: the label of the items.
        adapter: the engine's name of it; None = the one that was active when the engine was made.
        max_new_tokens: of an answer.
        judge: reads what no rule can.

    Raises:
        ConfigError: the engine cannot run under ``skip``.
        JudgeError: the judge does not answer.
    """
    answers: dict[str, Answered] = {}
    sampling = Sampling(max_new_tokens=max_new_tokens)

    def requests() -> Iterator[Request]:
        for question in dataset.questions:
            if question.problem is not None:
                continue
            try:
                images = [image.open() for image in question.images]
            except ImageError as error:
                answers[question.index] = Answered(error=f"{error.kind}: {error}")
                continue
            chat = [{"role": m.role, "content": content_parts(m.text)} for m in question.messages]
            yield Request(chat, images, sampling=sampling, skip=skip, adapter=adapter, key=question.index)

    for completion in engine.run(requests()):
        if isinstance(completion.error, ConfigError):  # which no other question would change
            raise completion.error
        if completion.error is not None or not completion.choices:
            answers[completion.key] = Answered(error=f"generation: {completion.error}")
        else:
            answers[completion.key] = Answered(completion.text.strip())
    return score_answers(dataset, answers, system, judge)
