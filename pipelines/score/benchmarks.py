"""The benchmarks that can be scored: their rules, totals, sources and download addresses.

The datasets have VLMEvalKit's names and file format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.evaluation.measures import Gold, Measure
from pipelines.evaluation.objects import SHAPES_CAPTIONS
from pipelines.evaluation.places import place_measures
from pipelines.score.rules.registry import RULES, Rule
from pipelines.score.totals import ScoredAnswer, mme, ocrbench, pope
from skipvision.errors import ConfigError

_HOST = "https://opencompass.openxlab.space/utils"


@dataclass(frozen=True)
class Benchmark:
    """A family of datasets with the same format and rule.

    Attributes:
        pattern: a regular expression that matches the names of its datasets.
        rule: gives the answers to its rows their points.
        url: the address of a file; ``{name}`` is replaced by the dataset's name.
        source: the publication.
        category: the columns that may hold a row's slice; the first non-empty one is used.
        split: the value of the column ``split`` in the rows that count, if there is that column; None = all.
        circular: whether rows are rotations of questions and count only together.
        totals: computes the published numbers besides the mean of the points.
        rows: the size of the whole dataset, where totals are sums over it; None = totals of any part.
        measures: make measures besides the score from the gold answers.
    """

    pattern: str
    rule: Rule
    url: str
    source: str
    category: tuple[str, ...] = ("category", "split")
    split: str | None = None
    circular: bool = False
    totals: Callable[[Sequence[ScoredAnswer]], dict[str, float]] = lambda answers: {}
    rows: int | None = None
    measures: tuple[Callable[[Gold], list[Measure]], ...] = ()


def _benchmark(pattern: str, rule: str, folder: str, source: str, **more: object) -> Benchmark:
    return Benchmark(pattern, RULES[rule], f"{_HOST}/{folder}/{{name}}.tsv", source, **more)  # type: ignore[arg-type]


BENCHMARKS = (
    _benchmark(
        "MMBench(_DEV|_TEST)?(_EN|_CN)?(_V11)?",
        "option",
        "benchmarks/MMBench",
        "MMBench, arXiv 2307.06281",
        circular=True,
    ),
    _benchmark("MMStar", "option", "VLMEval", "MMStar, arXiv 2403.20330"),
    _benchmark("MMMU_(DEV_VAL|TEST)", "option", "VLMEval", "MMMU, arXiv 2311.16502", split="validation"),
    _benchmark("MME", "yes_or_no_at_first", "VLMEval", "MME, arXiv 2306.13394", totals=mme, rows=2374),
    _benchmark("POPE", "yes_or_no", "VLMEval", "POPE, arXiv 2305.10355", totals=pope),
    _benchmark("TextVQA_VAL", "vqa", "VLMEval", "TextVQA, arXiv 1904.08920"),
    _benchmark("OCRBench", "contains", "VLMEval", "OCRBench, arXiv 2305.07895", totals=ocrbench, rows=1000),
    _benchmark("GQA_TestDev_Balanced", "exact", "VLMEval", "GQA, arXiv 1902.09506"),
    _benchmark("ScienceQA_(VAL|TEST)", "option", "benchmarks/ScienceQA", "ScienceQA, arXiv 2209.09513"),
    _benchmark("AI2D_TEST(_NO_MASK)?", "option", "VLMEval", "AI2D, arXiv 1603.07396"),
    _benchmark("ChartQA_TEST", "relaxed", "VLMEval", "ChartQA, arXiv 2203.10244"),
    _benchmark(
        "DocVQA_(VAL|TEST)", "anls", "VLMEval", "DocVQA, arXiv 2007.00398", category=("question_type",)
    ),
    _benchmark("MathVista_MINI", "mathvista", "VLMEval", "MathVista, arXiv 2310.02255", category=("task",)),
    _benchmark("MMVet", "judged", "VLMEval", "MM-Vet, arXiv 2308.02490"),
    Benchmark(
        *("Shapes", RULES["same_text"], "", "this project: jobs/make_shapes.py with tsv: true"),
        measures=(SHAPES_CAPTIONS.measures, place_measures),
    ),
)


def find_benchmark(name: str, rule: str | None) -> Benchmark:
    """Return the benchmark of a dataset. With a rule, the dataset is the user's own and may have any name.

    Raises:
        ConfigError: the rule is unknown, or the name is unknown and there is no rule.
    """
    if rule is not None and rule not in RULES:
        raise ConfigError(f"datasets.rule = {rule!r} is not known; the rules are {', '.join(RULES)}")
    if rule is not None:
        return Benchmark(re.escape(name), RULES[rule], "", "your own")
    for benchmark in BENCHMARKS:
        if re.fullmatch(benchmark.pattern, name):
            return benchmark
    known = ", ".join(benchmark.pattern for benchmark in BENCHMARKS)
    raise ConfigError(
        f"dataset {name!r} is not known; the known names, as patterns: {known}. For a dataset of your own, "
        f"set the rule that gives its points (rule: {' | '.join(RULES)})"
    )
