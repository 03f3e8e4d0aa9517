"""Settings of the trade-off job."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipelines.engines.config import BaseModelSection
from pipelines.shared.paths import InputPath, OutputFolder
from pipelines.shared.sections import JobConfig, Section
from skipvision.baselines import BASELINES
from skipvision.config import SkipConfig

FULL, GRID, AS_TUNED, SKIP_VISION = "full", "skip-vision grid", "as tuned", "skip-vision"
PIXELS = "pixels"
"""Names of methods besides the baselines."""


def _known_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    known = (*BASELINES, PIXELS)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown: {', '.join(unknown)}; known methods: {', '.join(known)}")
    return names


class AdapterSection(Section):
    """An adapter, or the base model without one, and Skip-Vision under it."""

    path: InputPath | None = Field(None, description="folder of the adapter; null = the base model")
    other_seeds: tuple[InputPath, ...] = Field(
        (),
        description="folders of adapters from the same fine-tune under other seeds: their answers are "
        "pooled; times and grid use the first adapter only; select=random draws a pattern for each seed",
    )
    skip: SkipConfig | None = Field(
        None,
        description="SkipConfig of Skip-Vision; null = as the adapter was trained, or the defaults. "
        "Points of other sizes keep the ratio of its retained and skipped tokens",
    )
    reference: str | None = Field(
        None, description="adapter whose full-token answers are the reference; null = this adapter"
    )


class GridSection(Section):
    """A grid of Skip-Vision sizes under every adapter: all pairs of retained and skipped tokens."""

    retained: tuple[int, ...] = Field((16, 32, 64, 128), description="numbers of retained tokens")
    skipped: tuple[int, ...] = Field((0, 32, 64), description="numbers of skipped tokens")


class DifficultSection(Section):
    """The point whose wrong answers make an item difficult, as in VTC-Bench (arXiv 2510.07143)."""

    method: str = Field("downscaled", description="a method of skipvision.baselines, or pixels")
    fraction: float = Field(0.3, gt=0, le=1, description="its budget; `fractions` need not have it")

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_methods((value,))[0]


class TradeoffConfig(JobConfig):
    """Accuracy against cost on one base model: baselines at equal FLOPs, and a grid of Skip-Vision."""

    model: BaseModelSection
    adapters: dict[str, AdapterSection] = Field(
        {"untuned": AdapterSection()}, min_length=1, description="adapters by label"
    )
    test: InputPath = Field("data/shapes/test.json", description="test rows: LLaVA JSON, JSONL or parquet")
    rows: int = Field(300, ge=1, description="max test rows, in equal shares per task")
    batch_size: int = Field(50, ge=1, description="max answers that an engine generates at once")
    max_new_tokens: int = Field(96, ge=1, description="max tokens of an answer")
    kv_budget_bytes: int = Field(2**30, ge=1, description="bytes for keys and values of these answers")
    methods: tuple[str, ...] = Field(
        (*BASELINES, PIXELS),
        description="methods of skipvision.baselines; and pixels, smaller images at the same FLOPs",
    )
    pixel_sides: tuple[int, ...] = Field(
        (), description="further sizes of smaller images, in pixels; with pixels in methods"
    )
    fractions: tuple[float, ...] = Field(
        (0.25, 0.3, 0.5), description="budgets: shares of the full prefill FLOPs without the vision tower"
    )
    grid: GridSection = GridSection()
    latency_rounds: int = Field(9, ge=0, description="measurements of the times at each point; 0 = none")
    difficult: DifficultSection | None = Field(
        None, description="report accuracy on the items that this point has wrong, and right; null = not"
    )
    second_turn: tuple[str, ...] = Field(
        (),
        description="methods, or as tuned, whose points also answer each question as a follow-up to another "
        "question about the same image; full tokens then do too",
    )
    objects: tuple[str, ...] | None = Field(
        None, description="names of objects in answers of task caption; null = those of shapes"
    )
    cpus_per_task: float = Field(1, gt=0, description="CPUs of a Ray task; a task scores one point")
    report: OutputFolder | None = Field(None, description="folder to copy the table and the figures to")

    @property
    def budgets(self) -> list[tuple[str, float]]:
        """All methods with their budgets: ``methods`` at ``fractions``, and the one of ``difficult``."""
        pairs = [(method, fraction) for method in self.methods for fraction in self.fractions]
        if self.difficult is not None:
            pairs.append((self.difficult.method, self.difficult.fraction))
        return list(dict.fromkeys(pairs))

    @property
    def pixel_fractions(self) -> list[float]:
        """The budgets of smaller images."""
        return [fraction for method, fraction in self.budgets if method == PIXELS]

    @field_validator("adapters")
    @classmethod
    def _first_seed(cls, value: dict[str, AdapterSection]) -> dict[str, AdapterSection]:
        if wrong := [label for label, one in value.items() if one.other_seeds and one.path is None]:
            raise ValueError(
                f"{', '.join(wrong)}: other_seeds needs a path, which is the adapter of the first seed"
            )
        return value

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _known_methods(value)

    @field_validator("fractions")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [share for share in value if not 0 < share <= 1]:
            raise ValueError(f"{wrong}: a budget is above 0 and at most 1")
        return value

    @model_validator(mode="after")
    def _chosen_points(self) -> Self:
        points = (*self.methods, AS_TUNED)
        if unknown := [name for name in self.second_turn if name not in points]:
            raise ValueError(f"second_turn: {unknown[0]} is none of {', '.join(points)}")
        if self.pixel_sides and PIXELS not in self.methods:
            raise ValueError(f"pixel_sides needs {PIXELS} in methods")
        return self

    @model_validator(mode="after")
    def _references(self) -> Self:
        for label, adapter in self.adapters.items():
            reference = self.adapters.get(adapter.reference or label)
            if reference is None:
                raise ValueError(
                    f"adapters.{label}.reference: no adapter {adapter.reference!r}; choose from "
                    f"{', '.join(self.adapters)}"
                )
            own, theirs = len(adapter.other_seeds), len(reference.other_seeds)
            if theirs not in (0, own):
                raise ValueError(
                    f"adapters.{label} has {own} other seeds and its reference {adapter.reference!r} has "
                    f"{theirs}: they are paired seed by seed, so give the reference {own} or none"
                )
        return self
