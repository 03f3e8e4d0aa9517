"""Predictions become scored items, and items become mean scores."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipelines.data.error_limit import ErrorLimit
from pipelines.evaluation.items import Item, categories
from pipelines.score.dataset import Dataset, Question
from pipelines.score.rules.judge import Judge
from pipelines.score.rules.judge_endpoint import NoVerdictError
from pipelines.score.rules.multiple_choice import all_rotations_right
from pipelines.score.totals import ScoredAnswer


@dataclass(frozen=True)
class Prediction:
    """A system's answer to a question, or the reason why it has no points."""

    text: str = ""
    error: str | None = None
    log_probability: float | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of a system on a dataset.

    Attributes:
        items: the scored items, in the dataset's order.
        totals: the numbers that the benchmark publishes besides the mean score. Totals that are sums are left
            out unless the dataset is complete.
    """

    items: list[Item]
    totals: dict[str, float]


Systems = Mapping[str, Mapping[str, Scored]]
"""The scores of each system, by system and dataset."""


def score_answers(
    dataset: Dataset,
    predictions: Mapping[str, Prediction],
    system: str,
    judge: Judge | None = None,
    parallel: int = 1,
    max_error_fraction: float | None = None,
) -> Scored:
    """Score every question of a dataset. A question without a prediction gets no points.

    Args:
        dataset: the questions with their gold answers.
        predictions: by the index of the question.
        system: the label of the system.
        judge: reads answers that no rule can read. If it refuses one or its reply is unreadable, the item has
            an error.
        parallel: concurrent requests to the judge.
        max_error_fraction: the share of questions that may have an error; None = all of them.

    Raises:
        DataError: more questions have an error; the judge then gets no further requests.
        JudgeError: the judge cannot be reached.
    """
    questions = dataset.questions
    predicted = [_prediction_for(question, predictions) for question in questions]
    errors = Counter(one.error.partition(":")[0] for one in predicted if one.error)
    limit = None if max_error_fraction is None else ErrorLimit(max_error_fraction, len(questions))
    if limit is not None:
        limit.check(errors)

    def score(question: Question, prediction: Prediction) -> tuple[Prediction, float]:
        if prediction.error:
            return prediction, 0.0
        try:
            return prediction, dataset.benchmark.rule.points(question.row, prediction.text, judge)
        except NoVerdictError as error:
            errors["judge"] += 1
            if limit is not None:
                limit.check(errors, f"{dataset.name} {question.index}: {error}")
            return replace(prediction, error=f"judge: {error}"), 0.0

    if judge is None:
        scored = list(map(score, questions, predicted))
    else:
        with ThreadPoolExecutor(parallel) as pool:
            scored = list(pool.map(score, questions, predicted))
    return Scored(list(_items(dataset, system, scored)), _totals(dataset, scored))


def _prediction_for(question: Question, predictions: Mapping[str, Prediction]) -> Prediction:
    if question.problem is not None:
        return Prediction(error=question.problem)
    return predictions.get(question.index) or Prediction(error="there is no answer to it")


def _totals(dataset: Dataset, scored: Sequence[tuple[Prediction, float]]) -> dict[str, float]:
    if dataset.benchmark.rows not in (None, len(scored)):
        return {}
    return dataset.benchmark.totals(
        [
            ScoredAnswer(question.row, question.group, prediction.text, score)
            for question, (prediction, score) in zip(dataset.questions, scored, strict=True)
        ]
    )


def _items(dataset: Dataset, system: str, scored: Sequence[tuple[Prediction, float]]) -> Iterator[Item]:
    """Yield one item for each question. The rotations of a circular question form one item."""
    rotations: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(dataset.questions):
        rotations[question.item].append(position)
    for index, positions in rotations.items():
        first = dataset.questions[positions[0]]
        predictions = [scored[position][0] for position in positions]
        scores = [scored[position][1] for position in positions]
        circular = dataset.benchmark.circular
        yield Item(
            dataset=dataset.name,
            index=index,
            system=system,
            category=first.category,
            group=first.group,
            prediction=" | ".join(prediction.text for prediction in predictions),
            score=all_rotations_right([score == 1 for score in scores]) if circular else scores[0],
            error=next((prediction.error for prediction in predictions if prediction.error), None),
            log_probability=_joint([prediction.log_probability for prediction in predictions]),
        )


def _joint(logarithms: Sequence[float | None]) -> float | None:
    """Return the log probability of all answers together; None if one is missing."""
    known = [one for one in logarithms if one is not None]
    return sum(known) if len(known) == len(logarithms) else None


# ------------------------------------------------------------------------------------------ numbers


def mean_score(items: Sequence[Item]) -> float:
    """Return the mean of the items' scores, a fraction."""
    return sum(item.score for item in items) / len(items)


def by_category(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Group items by category. An item with several categories, as in MM-Vet and POPE, is in each of them."""
    slices: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        for category in categories(item.category):
            slices[category].append(item)
    return {category: slices[category] for category in sorted(slices)}
