"""The search space of a calibration: the configs with their costs, and the questions to evaluate."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import product
from typing import Any

from transformers import PretrainedConfig

import skipvision as sv
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import Candidate
from pipelines.calibrate.pricing import Pricing
from pipelines.calibrate.search import NothingWithinBudgetError
from pipelines.engines.loading import empty_model
from pipelines.engines.model import EngineModel
from pipelines.score.dataset import Dataset, read_dataset
from pipelines.shared.console import say
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, DataError


def parts(config: CalibrateConfig) -> tuple[Dataset, Dataset]:
    """Split the questions by image: those of the search, in the order of rungs, and the held-out ones."""
    given = config.questions
    whole = read_dataset(
        given.name, given.path, rule=given.rule, instruction=given.instruction, limit=given.limit
    )
    if whole.benchmark.rule.needs_judge:
        raise ConfigError(
            f"data.name = {given.name}: its answers need a judge, which calibration does not have"
        )
    groups = sorted({question.group for question in whole.questions})
    random.Random(config.search.seed).shuffle(groups)
    held_out = round(given.held_out * len(groups))
    if not 0 < held_out < len(groups):
        raise DataError(
            f"{whole.file}: {len(groups)} images are too few to hold out {given.held_out:g} of them"
        )
    rank = {group: number for number, group in enumerate(groups)}
    ordered = sorted(whole.questions, key=lambda question: rank[question.group])
    return (
        replace(whole, questions=tuple(q for q in ordered if rank[q.group] >= held_out)),
        replace(whole, questions=tuple(q for q in ordered if rank[q.group] < held_out)),
    )


def candidates(
    config: CalibrateConfig, model: EngineModel, model_config: PretrainedConfig, dataset: Dataset
) -> list[Candidate]:
    """Return the configs of the search space whose predicted costs are within the budget.

    Raises:
        ConfigError: the model does not support a config.
        NothingWithinBudgetError: all configs cost too much.
    """
    base = model.skip if model.adapter is not None else (config.skip or sv.SkipConfig())
    configs = combinations(config.space, base)
    summaries = {one.summary_tokens for one in configs} - {0}
    if len(summaries) > 1 or (model.adapter is not None and not summaries <= {base.summary_tokens}):
        trained = f"the adapter was trained with {base.summary_tokens}; " if model.adapter else ""
        raise ConfigError(
            f"space.summary_tokens = {sorted(summaries)}: {trained}a model supports one number besides 0"
        )
    empty = empty_model(model_config)
    pricing = Pricing.of(model, model_config, dataset.questions)
    priced = []
    for skip in configs:
        with sv.attach(empty, skip):  # raises if the model does not support the config
            pass
        priced.append(Candidate(pricing.name(skip), skip, pricing.costs(skip)))
    limits = {name: limit for name, limit in config.budget.on_costs.items() if name != "latency"}
    cheap = [c for c in priced if all(c.costs[name] <= limit for name, limit in limits.items())]
    if not cheap:
        least = {name: round(min(c.costs[name] for c in priced), 3) for name in limits}
        raise NothingWithinBudgetError(
            f"every config of the space costs more than the budget {json.dumps(limits)}; the cheapest costs "
            f"{json.dumps(least)}: widen the space"
        )
    say(f"{len(priced)} configs, {len(cheap)} of them within the limits on predicted costs")
    return cheap


def combinations(space: dict[str, list[Any]], base: SkipConfig) -> list[SkipConfig]:
    """Return every valid combination of values once.

    Raises:
        ConfigError: no combination is valid.
    """
    found: dict[SkipConfig, None] = {}
    problems = []
    for values in product(*space.values()):
        try:
            found[SkipConfig(**{**base.model_dump(), **dict(zip(space, values, strict=True))})] = None
        except ConfigError as error:
            problems.append(str(error))
    if not found:
        raise ConfigError(f"space: no combination of values is valid; the first error: {problems[0]}")
    return list(found)
