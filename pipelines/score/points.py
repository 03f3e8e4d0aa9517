"""Answers to the questions of a dataset become scored items, and items become numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipelines.evaluation.items import Item, categories
from pipelines.score.benchmarks import Said
from pipelines.score.dataset import Dataset, Question
from pipelines.score.rules.judge import Judge
from pipelines.score.rules.judge_endpoint import NoVerdictError
from pipelines.score.rules.multiple_choice import all_rotations_right
from pipelines.shared.error_limit import ErrorLimit


@dataclass(frozen=True)
class Answered:
    """What a system said to a question, or why that has no points."""

    text: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Scored:
    """A system on a dataset.

    Attributes:
        items: one for each item, in the dataset's order.
        totals: what the benchmark publishes beside the mean score; sums only where the dataset is whole.
    """

    items: list[Item]
    totals: dict[str, float]


def score_answers(
    dataset: Dataset,
    answers: Mapping[str, Answered],
    system: str,
    judge: Judge | None = None,
    parallel: int = 1,
    max_error_fraction: float | None = None,
) -> Scored:
    """Give every question of a dataset its points; one without an answer has none.

    Args:
        dataset: what was asked.
        answers: by the questions' indices.
        system: who answered.
        judge: reads what no rule can; an answer that it refuses or does not make out has an error.
        parallel: questions the judge is asked at once.
        max_error_fraction: share of the questions that may have an error; None = all.

    Raises:
        DataError: more of them have one; the judge is asked no more then.
        JudgeError: the judge cannot be reached.
    """
    questions = dataset.questions
    given = [_answer_to(question, answers) for question in questions]
    errors = Counter(answer.error.partition(":")[0] for answer in given if answer.error)
    limit = None if max_error_fraction is None else ErrorLimit(max_error_fraction, len(questions))
    if limit is not None:
        limit.check(errors)

    def judged(question: Question, answer: Answered) -> tuple[Answered, float]:
        if answer.error:
            return answer, 0.0
        try:
            return answer, dataset.benchmark.rule.points(question.row, answer.text, judge)
        except NoVerdictError as error:
            errors["judge"] += 1
            if limit is not None:
                limit.check(errors, f"{dataset.name} {question.index}: {error}")
            return Answered(answer.text, f"judge: {error}"), 0.0

    if judge is None:
        pairs = [judged(question, answer) for question, answer in zip(questions, given, strict=True)]
    else:
        with ThreadPoolExecutor(parallel) as pool:
            pairs = list(pool.map(judged, questions, given))
    given, scores = [answer for answer, _ in pairs], [score for _, score in pairs]
    said = [
        Said(question.row, question.group, answer.text, score)
        for question, answer, score in zip(questions, given, scores, strict=True)
    ]
    whole = dataset.benchmark.rows in (None, len(said))
    totals = dataset.benchmark.totals(said) if whole else {}
    return Scored(list(_items(dataset, system, questions, given, scores)), totals)


def _answer_to(question: Question, answers: Mapping[str, Answered]) -> Answered:
    if question.problem is not None:
        return Answered(error=question.problem)
    return answers.get(question.index) or Answered(error="there is no answer to it")


def _items(
    dataset: Dataset,
    system: str,
    questions: Sequence[Question],
    answers: Sequence[Answered],
    scores: Sequence[float],
) -> Iterator[Item]:
    """Rotations of one question, which is all or nothing, are one item; any other question is one itself."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        places[question.item].append(place)
    for index, here in places.items():
        first = questions[here[0]]
        errors = [answers[place].error for place in here if answers[place].error]
        circular = dataset.benchmark.circular
        yield Item(
            dataset=dataset.name,
            index=index,
            system=system,
            category=first.category,
            group=first.group,
            prediction=" | ".join(answers[place].text for place in here),
            score=all_rotations_right([scores[place] == 1 for place in here])
            if circular
            else scores[here[0]],
            error=errors[0] if errors else None,
        )


# ------------------------------------------------------------------------------------------ numbers


def mean_score(items: Sequence[Item]) -> float:
    """The mean of the points."""
    return sum(item.score for item in items) / len(items)


def by_category(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by slice; one whose category lists several, as MM-Vet's and POPE's do, is in each."""
    slices: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        for category in categories(item.category):
            slices[category].append(item)
    return {category: slices[category] for category in sorted(slices)}
