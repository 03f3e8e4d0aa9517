"""The points of a trade-off: one method, of one size, under one adapter; and how one is scored and timed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

import skipvision as sv
from pipelines.data.chat import ChatFormat, encode
from pipelines.data.collate import open_images
from pipelines.data.rows import TrainingRow
from pipelines.engines.config import BaseModelSection
from pipelines.engines.loading import arithmetic, load_frozen, load_processor
from pipelines.evaluation.exact_match import evaluate_exact_match
from pipelines.evaluation.items import Item
from pipelines.evaluation.paired import Paired
from pipelines.score.fingerprints import of_images
from pipelines.tradeoff.config import TradeoffConfig
from skipvision.baselines import BASELINES, at_cost
from skipvision.errors import ConfigError

FULL, GRID, AS_TUNED, SKIP_VISION = "full", "skip-vision grid", "as tuned", "skip-vision"


@dataclass(frozen=True)
class Point:
    """One method, of one size, under one adapter.

    Attributes:
        adapter: label of the adapter.
        paths: its folder, by seed.
        method: name in the table.
        skip: what is applied; None = full tokens.
        kept: tokens of a picture that are retained and skipped; None = all.
        budget: share of the full prefill FLOPs that it may spend; None where no share was asked for.
    """

    adapter: str
    paths: tuple[str | None, ...]
    method: str
    skip: sv.SkipConfig | None
    kept: tuple[int, int] | None = None
    budget: float | None = None

    def under(self, seed: int) -> sv.SkipConfig | None:
        """What is applied under one seed: each has a random pattern of its own."""
        if self.skip is None or not self.skip.criterion.seeded:
            return self.skip
        return self.skip.model_copy(update={"seed": self.skip.seed + seed})

    def digest(self, asked: str, adapter: str | None, seed: int) -> str:
        """Names its results under one seed, together with digests of what is asked and of the adapter."""
        skip = self.under(seed)
        named = [asked, adapter, None if skip is None else skip.model_dump()]
        return sha256(json.dumps(named).encode()).hexdigest()[:16]


Answered = tuple[Point, int]
"""A point under one of its seeds."""


@dataclass(frozen=True)
class Found:
    """One point as it turned out.

    Attributes:
        point: what it is.
        language_flops: predicted prefill FLOPs, vision tower left out, ÷ full tokens.
        prefill_flops: the same with the tower.
        kv_bytes: predicted bytes of KV cache after prefill ÷ full tokens.
        latency: median, over the rounds, of time to the first token ÷ that of full tokens in the same round;
            None if not measured.
        latency_quartiles: first and third quartile of the same.
        first_token_seconds: first quartile, median and third quartile of the time itself.
        accuracy: share of exact answers, by task and overall.
        gap: against full tokens, by task and overall.
        by_seed: the overall gap under each seed.
        behind: Skip-Vision under the same adapter and budget against this, overall; None if there is none, or
            it is this.
    """

    point: Point
    language_flops: float
    prefill_flops: float
    kv_bytes: float
    latency: float | None
    latency_quartiles: tuple[float, float] | None
    first_token_seconds: tuple[float, float, float] | None
    accuracy: dict[str, float]
    gap: dict[str, Paired]
    by_seed: list[float]
    behind: Paired | None


def points(config: TradeoffConfig, model: PretrainedConfig, text_tokens: int) -> Iterator[Point]:
    """All points of a job; what costs more than it may with its fewest tokens is left out, and said."""
    visual = sv.predict_cost(model, None, text_tokens=text_tokens).sequence - text_tokens
    for label, adapter in config.adapters.items():
        own = None if adapter.path is None else sv.read_adapter(adapter.path)["skip"]
        shape = adapter.skip or own
        shapes: dict[str, sv.SkipConfig] = {**BASELINES, **({SKIP_VISION: shape} if shape else {})}
        found: list[tuple[str, sv.SkipConfig | None, float | None]] = [(FULL, None, None)]
        found += [(AS_TUNED, _counted(own, visual), None)] if own else []
        for method in config.methods:
            for fraction in config.fractions:
                try:
                    skip = at_cost(model, shapes[method], fraction, text_tokens=text_tokens)
                except ConfigError as error:
                    print(f"{label}, {method}: {error}", flush=True)
                    continue
                found.append((method, skip, fraction))
        for retained in config.grid.retained:
            for skipped in config.grid.skipped:
                counts = {"retained": retained, "skipped": skipped}
                found.append((GRID, shapes[SKIP_VISION].model_copy(update=counts), None))
        paths = (adapter.path, *adapter.other_seeds)
        for method, skip, budget in found:
            seeds = paths[:1] if method == GRID else paths  # it draws curves; one is enough for these
            yield Point(label, seeds, method, skip, skip and skip.counts(visual)[:2], budget)


def _counted(skip: sv.SkipConfig, tokens: int) -> sv.SkipConfig:
    """Numbers of tokens instead of fractions."""
    retained, skipped, _ = skip.counts(tokens)
    return skip.model_copy(update={"retained": retained, "skipped": skipped})


def model_config(model: BaseModelSection) -> PretrainedConfig:
    """The config of the base model; raises `ConfigError`."""
    try:
        return AutoConfig.from_pretrained(model.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path = {model.path}: {error}") from error


def text_tokens(model: BaseModelSection, rows: Sequence[TrainingRow]) -> int:
    """Tokens of a prompt that are not visual, on average."""
    chat = ChatFormat(load_processor(model.path))
    prompts = [chat.prompt(row.messages[:-1]) for row in rows]
    lengths = [len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    # Of an image its one placeholder is in the text.
    return round(statistics.mean(lengths) - statistics.mean(len(row.images) for row in rows))


def score(point: Point, seed: int, config: TradeoffConfig, rows: Sequence[TrainingRow]) -> list[Item]:
    """Every row's answer at a point under one seed, one point for exactly what was expected."""
    model, processor = _built(config.model, point.paths[seed])
    with _applied(model, point.under(seed)), _computing(model):
        answers = evaluate_exact_match(
            model, processor, rows, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
        )
    groups = [of_images(row.images[:1]) if row.images else row.key for row in rows]
    return [
        Item("test", row.key, point.method, row.task, group, answer.answer, float(answer.correct))
        for row, group, answer in zip(rows, groups, answers, strict=True)
    ]


def first_token_seconds(
    some: Sequence[Point], config: TradeoffConfig, rows: Sequence[TrainingRow]
) -> list[list[float]]:
    """Seconds to the first token at each point of one adapter, round by round.

    A round is one row, at all points in turn: what the row costs and what else the machine does weigh on all
    of them, so that times of one round are to be compared with each other.
    """
    model, processor = _built(config.model, some[0].paths[0])
    chat = ChatFormat(processor)
    seconds: list[list[float]] = [[] for _ in some]
    for number in range(config.latency_rounds + 1):
        row = rows[number % len(rows)]
        _, images = open_images([row], None)
        prompt = encode(processor, [chat.prompt(row.messages[:-1])], images, padding_side="left")
        inputs = {name: value.to(model.device) for name, value in prompt.items()}
        for point, own in zip(some, seconds, strict=True):
            with _applied(model, point.skip), _computing(model):
                started = time.perf_counter()
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first time is to warm up
                    own.append(time.perf_counter() - started)
    return seconds


@lru_cache(maxsize=1)
def _built(section: BaseModelSection, path: str | None) -> tuple[Any, Any]:
    """The model under an adapter, kept for the next point of this process, and its processor."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_frozen(section, arithmetic("auto", device), device)
    if path is not None:
        model = sv.load_adapter(model, path)
        model.merge_adapter()
    return model.eval(), load_processor(section.path)


@contextmanager
def _applied(model: Any, skip: sv.SkipConfig | None) -> Iterator[None]:
    """Skip-Vision as a point has it, on the adapter's own summary layer where there is one."""
    skip = skip or sv.SkipConfig.full()
    there = sv.attachment_of(model)
    with sv.attach(model, skip) if there is None else there.using(skip):
        yield


@contextmanager
def _computing(model: Any) -> Iterator[None]:
    kind = model.device.type
    half = arithmetic("auto", model.device) == torch.bfloat16
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=half):
        yield
