"""The benchmarks that can be scored: what is asked, which rule gives points, where their files are.

A `Rule` gives one answer its points; a benchmark's totals are what it publishes beside their mean.
Names of datasets are VLMEvalKit's, and so are the files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.data.instructions import OPTION_QUESTION, SHORT_QUESTION, WHOLE_QUESTION, YES_OR_NO_QUESTION
from pipelines.data.literals import literal
from pipelines.data.tsv_records import options
from pipelines.evaluation.exact_match import normalised
from pipelines.evaluation.items import categories
from pipelines.score.rules import mathvista
from pipelines.score.rules import short_answer as short_answers
from pipelines.score.rules.judge import Judge
from pipelines.score.rules.multiple_choice import chosen_option
from pipelines.score.rules.open_ended import open_answer
from pipelines.score.rules.short_answer import yes_or_no, yes_or_no_at_first
from skipvision.errors import ConfigError

Row = Mapping[str, str]
_HOST = "https://opencompass.openxlab.space/utils"


class Said(NamedTuple):
    """One answer with its points, as totals are made of them."""

    row: Row
    group: str
    answer: str
    score: float


@dataclass(frozen=True)
class Rule:
    """How an answer gets its points.

    Attributes:
        points: from the row, the answer and the judge, if there is one: 0 … 1.
        columns: that a row must have, beside ``index`` and ``question``.
        needs_judge: it cannot do without.
        asks: the column that is asked, where a dataset has no instruction of its own.
        problem: why no answer to a row can be right; None if one can.
    """

    points: Callable[[Row, str, Judge | None], float]
    columns: tuple[str, ...] = ("answer",)
    needs_judge: bool = False
    asks: str = SHORT_QUESTION
    problem: Callable[[Row], str | None] = lambda row: None


@dataclass(frozen=True)
class Benchmark:
    """A family of datasets of one format.

    Attributes:
        pattern: names of its datasets.
        rule: of its rows.
        url: of a file; ``{name}`` stands for the dataset's.
        source: publication.
        category: column of slices; the first one that is there.
        split: value of the column ``split`` that counts, where there is that column; None = all.
        circular: rows are rotations of questions, and count only together.
        totals: what is published beside the mean of the points.
        rows: how many there must be for the totals, where they are sums over all of the dataset; None = any.
    """

    pattern: str
    rule: Rule
    url: str
    source: str
    category: tuple[str, ...] = ("category", "split")
    split: str | None = None
    circular: bool = False
    totals: Callable[[Sequence[Said]], dict[str, float]] = lambda said: {}
    rows: int | None = None


# -------------------------------------------------------------------------------------------- rules


def golds(row: Row) -> list[str]:
    """The answers of a row; VLMEvalKit writes several as a Python list."""
    text = row["answer"]
    try:
        listed = literal(text)
    except ValueError:
        return [text]
    return [str(value) for value in listed] if isinstance(listed, list) and listed else [text]


def _option(row: Row, answer: str, judge: Judge | None) -> float:
    choices = options(row)
    if not choices:
        return open_answer(answer, golds(row))
    letter = chosen_option(answer, choices)
    if letter is None and judge is not None:
        letter = judge.choose(row["question"], choices, answer)
    return float(letter == _gold_letter(row))


def _gold_letter(row: Row) -> str:
    return row["answer"].strip().upper()


def _no_option(row: Row) -> str | None:
    choices = options(row)
    if not choices or _gold_letter(row) in choices:
        return None
    return f"the gold answer {row['answer']!r} is not the letter of an option: {', '.join(choices)}"


def _yes_or_no(row: Row, answer: str, judge: Judge | None) -> float:
    return float(yes_or_no(answer) == _gold_word(row))


def _yes_or_no_at_first(row: Row, answer: str, judge: Judge | None) -> float:
    return float(yes_or_no_at_first(answer) == _gold_word(row))


def _gold_word(row: Row) -> str:
    return row["answer"].strip().capitalize()


def _neither(row: Row) -> str | None:
    if _gold_word(row) in ("Yes", "No"):
        return None
    return f"the gold answer {row['answer']!r} is neither yes nor no"


def _ocr(row: Row, answer: str, judge: Judge | None) -> float:
    if row.get("category") == _FORMULAS:
        return short_answers.contains_formula(answer, golds(row))
    return short_answers.contains(answer, golds(row))


def _judged(row: Row, answer: str, judge: Judge | None) -> float:
    if judge is None:
        raise ConfigError("this rule needs a judge")
    return judge.grade(row["question"], row["answer"], answer)


def _of_golds(points: Callable[[str, Sequence[str]], float]) -> Callable[[Row, str, Judge | None], float]:
    return lambda row, answer, judge: points(answer, golds(row))


def _same(answer: str, right: Sequence[str]) -> float:
    return float(normalised(answer) in map(normalised, right))


_FORMULAS = "Handwritten Mathematical Expression Recognition"

RULES = {
    "option": Rule(_option, asks=OPTION_QUESTION, problem=_no_option),
    "yes_or_no": Rule(_yes_or_no, asks=YES_OR_NO_QUESTION, problem=_neither),
    "yes_or_no_at_first": Rule(_yes_or_no_at_first, asks=YES_OR_NO_QUESTION, problem=_neither),
    "vqa": Rule(_of_golds(short_answers.vqa_accuracy)),
    "anls": Rule(_of_golds(short_answers.anls)),
    "relaxed": Rule(_of_golds(short_answers.relaxed_accuracy)),
    "exact": Rule(_of_golds(short_answers.exact)),
    "contains": Rule(_ocr, asks=WHOLE_QUESTION),
    "mathvista": Rule(mathvista.mathvista, mathvista.COLUMNS, asks=WHOLE_QUESTION, problem=mathvista.problem),
    "judged": Rule(_judged, needs_judge=True, asks=WHOLE_QUESTION),
    "same_text": Rule(_of_golds(_same), asks=WHOLE_QUESTION),
}
"""By the names that a dataset of one's own can be given one with."""


# ------------------------------------------------------------------------------------------- totals

_PERCEPTION = (
    *(
        "OCR",
        "artwork",
        "celebrity",
        "color",
        "count",
        "existence",
        "landmark",
        "position",
        "posters",
        "scene",
    ),
)
_COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def _mme(said: Sequence[Said]) -> dict[str, float]:
    """Accuracy and accuracy+ (both questions about an image right), in percent and summed up.

    Source: MME (arXiv 2306.13394), "Evaluation metric".
    """
    by_task: dict[str, list[Said]] = defaultdict(list)
    for one in said:
        by_task[one.row.get("category", "")].append(one)
    scores = {}
    for task, answers in by_task.items():
        images: dict[str, list[float]] = defaultdict(list)
        for one in answers:
            images[one.row.get("image_path") or one.group].append(one.score)
        plus = [min(points) for points in images.values()]
        scores[task] = 100 * (sum(one.score for one in answers) / len(answers) + sum(plus) / len(plus))
    return {
        "perception": sum(scores.get(task, 0.0) for task in _PERCEPTION),
        "cognition": sum(scores.get(task, 0.0) for task in _COGNITION),
        **{f"score/{task}": score for task, score in sorted(scores.items())},
    }


def _pope(said: Sequence[Said]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", and how often it is said; F1 also by category.

    An answer of several categories counts in each, and as often in all of them together. What is neither yes
    nor no counts as no. Source: POPE (arXiv 2305.10355), "Metrics"; one table for its three categories is
    VLMEvalKit's (vlmeval/dataset/utils/yorn.py).
    """
    by_category: dict[str, list[Said]] = defaultdict(list)
    for one in said:
        for category in categories(one.row.get("category", "")) or [""]:
            by_category[category].append(one)
    totals = _of_yes([one for some in by_category.values() for one in some])
    for category in sorted(filter(None, by_category)):
        totals[f"f1/{category}"] = _of_yes(by_category[category])["f1"]
    return totals


def _of_yes(said: Sequence[Said]) -> dict[str, float]:
    true = [_gold_word(one.row) == "Yes" for one in said]
    yes = [yes_or_no(one.answer) == "Yes" for one in said]
    hits = sum(gold and given for gold, given in zip(true, yes, strict=True))
    precision = hits / sum(yes) if any(yes) else 0.0
    recall = hits / sum(true) if any(true) else 0.0
    both = precision + recall
    f1 = 2 * precision * recall / both if both else 0.0
    return {"f1": f1, "precision": precision, "recall": recall, "yes_ratio": sum(yes) / len(said)}


def _ocrbench(said: Sequence[Said]) -> dict[str, float]:
    """The number of right answers, of 1,000. Source: OCRBench (arXiv 2305.07895), "Evaluation metric"."""
    return {"final_score": sum(one.score for one in said)}


# --------------------------------------------------------------------------------------- benchmarks


def _of(pattern: str, rule: str, folder: str, source: str, **more: object) -> Benchmark:
    return Benchmark(pattern, RULES[rule], f"{_HOST}/{folder}/{{name}}.tsv", source, **more)  # type: ignore[arg-type]


BENCHMARKS = (
    _of(
        "MMBench(_DEV|_TEST)?(_EN|_CN)?(_V11)?",
        "option",
        "benchmarks/MMBench",
        "MMBench, arXiv 2307.06281",
        circular=True,
    ),
    _of("MMStar", "option", "VLMEval", "MMStar, arXiv 2403.20330"),
    _of("MMMU_(DEV_VAL|TEST)", "option", "VLMEval", "MMMU, arXiv 2311.16502", split="validation"),
    _of("MME", "yes_or_no_at_first", "VLMEval", "MME, arXiv 2306.13394", totals=_mme, rows=2374),
    _of("POPE", "yes_or_no", "VLMEval", "POPE, arXiv 2305.10355", totals=_pope),
    _of("TextVQA_VAL", "vqa", "VLMEval", "TextVQA, arXiv 1904.08920"),
    _of("OCRBench", "contains", "VLMEval", "OCRBench, arXiv 2305.07895", totals=_ocrbench, rows=1000),
    _of("GQA_TestDev_Balanced", "exact", "VLMEval", "GQA, arXiv 1902.09506"),
    _of("ScienceQA_(VAL|TEST)", "option", "benchmarks/ScienceQA", "ScienceQA, arXiv 2209.09513"),
    _of("AI2D_TEST(_NO_MASK)?", "option", "VLMEval", "AI2D, arXiv 1603.07396"),
    _of("ChartQA_TEST", "relaxed", "VLMEval", "ChartQA, arXiv 2203.10244"),
    _of("DocVQA_(VAL|TEST)", "anls", "VLMEval", "DocVQA, arXiv 2007.00398", category=("question_type",)),
    _of("MathVista_MINI", "mathvista", "VLMEval", "MathVista, arXiv 2310.02255", category=("task",)),
    _of("MMVet", "judged", "VLMEval", "MM-Vet, arXiv 2308.02490"),
    Benchmark("Shapes", RULES["same_text"], "", "this project: jobs/make_shapes.py with tsv: true"),
)


def find_benchmark(name: str, rule: str | None) -> Benchmark:
    """The benchmark of a dataset; with a rule, any name is one's own dataset.

    Raises:
        ConfigError: the name is unknown and there is no rule, or the rule is unknown.
    """
    if rule is not None and rule not in RULES:
        raise ConfigError(f"datasets.rule = {rule!r} is not known; rules are {', '.join(RULES)}")
    for benchmark in BENCHMARKS:
        if rule is None and re.fullmatch(benchmark.pattern, name):
            return benchmark
    if rule is None:
        known = ", ".join(benchmark.pattern for benchmark in BENCHMARKS)
        raise ConfigError(
            f"dataset {name!r} is not known; known are, as patterns: {known}. For a dataset of your own, say "
            f"which rule gives its points (rule: {' | '.join(RULES)})"
        )
    return Benchmark(re.escape(name), RULES[rule], "", "your own")
