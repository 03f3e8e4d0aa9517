"""Totals: the numbers that a benchmark publishes besides the mean of its points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.evaluation.items import categories
from pipelines.score.rules.registry import Row, gold_word
from pipelines.score.rules.short_answer import yes_or_no

_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count"),
    *("existence", "landmark", "position", "posters", "scene"),
)
_COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


class ScoredAnswer(NamedTuple):
    """One answer with its points, and the row and group of its question."""

    row: Row
    group: str
    answer: str
    score: float


def mme(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return MME's scores: accuracy plus accuracy+ in percent, by task and summed.

    Accuracy+ is the share of images with both questions right. Source: MME (arXiv 2306.13394), "Evaluation
    metric".
    """
    by_task: dict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in answers:
        by_task[answer.row.get("category", "")].append(answer)
    scores = {task: _accuracy_and_plus(answers) for task, answers in sorted(by_task.items())}
    return {
        "perception": sum(scores.get(task, 0.0) for task in _PERCEPTION),
        "cognition": sum(scores.get(task, 0.0) for task in _COGNITION),
        **{f"score/{task}": score for task, score in scores.items()},
    }


def _accuracy_and_plus(answers: Sequence[ScoredAnswer]) -> float:
    by_image: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        by_image[answer.row.get("image_path") or answer.group].append(answer.score)
    plus = [min(points) for points in by_image.values()]
    return 100 * (sum(answer.score for answer in answers) / len(answers) + sum(plus) / len(plus))


def pope(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return precision, recall and F1 of "yes", the share of "yes", and F1 by category.

    An answer of several categories counts in each of them, and as often in the numbers over all. An answer
    that is neither yes nor no counts as no. Source: POPE (arXiv 2305.10355), "Metrics"; VLMEvalKit has one
    table for the three categories (vlmeval/dataset/utils/yorn.py).
    """
    by_category: dict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in answers:
        for category in categories(answer.row.get("category", "")) or [""]:
            by_category[category].append(answer)
    totals = _yes_metrics([answer for members in by_category.values() for answer in members])
    for category in sorted(filter(None, by_category)):
        totals[f"f1/{category}"] = _yes_metrics(by_category[category])["f1"]
    return totals


def _yes_metrics(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    true = [gold_word(answer.row) == "Yes" for answer in answers]
    yes = [yes_or_no(answer.answer) == "Yes" for answer in answers]
    hits = sum(gold and given for gold, given in zip(true, yes, strict=True))
    precision = hits / sum(yes) if any(yes) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, "yes_ratio": sum(yes) / len(answers)}


def ocrbench(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return the number of right answers, of 1,000.

    Source: OCRBench (arXiv 2305.07895), "Evaluation metric".
    """
    return {"final_score": sum(answer.score for answer in answers)}
