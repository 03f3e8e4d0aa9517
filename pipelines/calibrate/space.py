"""What a calibration searches: the configs with their costs, and the rows they are asked."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

import skipvision as sv
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.halving import Candidate
from pipelines.calibrate.search import NothingWithinBudgetError
from pipelines.engines.loading import load_processor
from pipelines.engines.model import EngineModel
from pipelines.score.dataset import Dataset, read_dataset
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, DataError


def parts(config: CalibrateConfig) -> tuple[Dataset, Dataset]:
    """Questions to search with, in the order of their rungs, and questions held out; no image is in both."""
    given = config.data
    whole = read_dataset(
        given.name, given.path, rule=given.rule, instruction=given.instruction, limit=given.limit
    )
    if whole.benchmark.rule.needs_judge:
        raise ConfigError(f"data.name = {given.name}: its answers need a judge, and calibration has none")
    groups = sorted({question.group for question in whole.questions})
    random.Random(config.search.seed).shuffle(groups)
    away = round(given.held_out * len(groups))
    if not 0 < away < len(groups):
        raise DataError(
            f"{whole.file}: {len(groups)} images are too few to hold out {given.held_out:g} of them"
        )
    place = {group: number for number, group in enumerate(groups)}
    ordered = sorted(whole.questions, key=lambda question: place[question.group])
    return (
        replace(whole, questions=tuple(q for q in ordered if place[q.group] >= away)),
        replace(whole, questions=tuple(q for q in ordered if place[q.group] < away)),
    )


def candidates(
    config: CalibrateConfig, model: EngineModel, model_config: PretrainedConfig, dataset: Dataset
) -> list[Candidate]:
    """The search space, priced, without what costs more than it may.

    Raises:
        ConfigError: a config is not possible with this model.
        NothingWithinBudgetError: all cost too much.
    """
    base = model.skip if model.adapter is not None else (config.skip or sv.SkipConfig())
    configs = combinations(config.space, base)
    summaries = {one.summary_tokens for one in configs} - {0}
    if len(summaries) > 1 or (model.adapter is not None and not summaries <= {base.summary_tokens}):
        trained = f"the adapter was trained with {base.summary_tokens}; " if model.adapter else ""
        raise ConfigError(
            f"space.summary_tokens = {sorted(summaries)}: {trained}a model has one number of them, beside 0"
        )
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(model_config)
    processor: Any = load_processor(model.base)
    some = dataset.questions[:100]
    text = sum(len(processor.tokenizer(m.text)["input_ids"]) for one in some for m in one.messages)
    priced = []
    for skip in configs:
        with sv.attach(empty, skip):  # what the model cannot do is an error here
            pass
        ratio = sv.predict_cost(
            model_config,
            skip,
            images=max(1, round(sum(len(one.images) for one in some) / len(some))),
            text_tokens=max(1, text // len(some)),
        ).ratio_to_full
        costs = {"prefill_flops": ratio.prefill_flops, "kv_bytes": ratio.kv_bytes}
        name = hashlib.sha256(skip.model_dump_json().encode()).hexdigest()[:8]
        priced.append(Candidate(name, skip, costs))
    limits = {name: most for name, most in config.budget.on_costs.items() if name != "latency"}
    cheap = [c for c in priced if all(c.costs[name] <= most for name, most in limits.items())]
    if not cheap:
        least = {name: round(min(c.costs[name] for c in priced), 3) for name in limits}
        raise NothingWithinBudgetError(
            f"no config of the space costs so little: budget {json.dumps(limits)}, the least in the space "
            f"{json.dumps(least)}; widen the space"
        )
    print(f"{len(priced)} configs, {len(cheap)} of them within the limits on predicted costs", flush=True)
    return cheap


def combinations(space: dict[str, list[Any]], base: SkipConfig) -> list[SkipConfig]:
    """Every combination that is a SkipConfig, once.

    Raises:
        ConfigError: none is.
    """
    found: dict[SkipConfig, None] = {}
    problems = []
    for values in product(*space.values()):
        try:
            found[SkipConfig(**{**base.model_dump(), **dict(zip(space, values, strict=True))})] = None
        except ConfigError as error:
            problems.append(str(error))
    if not found:
        raise ConfigError(f"space: no combination is possible; the first: {problems[0]}")
    return list(found)
