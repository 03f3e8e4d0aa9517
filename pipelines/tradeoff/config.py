"""Everything a trade-off job can be told."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipelines.engines.config import BaseModelSection
from pipelines.shared.sections import JobConfig, Section
from skipvision.baselines import BASELINES
from skipvision.config import SkipConfig


class AdapterSection(Section):
    """One way the base model was tuned."""

    path: str | None = Field(None, description="folder of the adapter; null = the base model as it came")
    other_seeds: tuple[str, ...] = Field(
        (),
        description="folders of adapters that the same fine-tune gave under other seeds; answers of all are "
        "pooled; times and the grid are the first one's; select=random draws another pattern under each",
    )
    skip: SkipConfig | None = Field(
        None,
        description="what Skip-Vision is here; null = as the adapter was trained, or the defaults. Where "
        "points have other sizes, its retained and skipped keep their ratio",
    )
    reference: str | None = Field(
        None, description="adapter under which full tokens are what this one is compared with; null = itself"
    )


class GridSection(Section):
    """Skip-Vision with each of these retained and each of these skipped tokens, under every adapter."""

    retained: tuple[int, ...] = Field((16, 32, 64, 128), description="numbers of retained tokens")
    skipped: tuple[int, ...] = Field((0, 32, 64), description="numbers of skipped tokens")


class TradeoffConfig(JobConfig):
    """What accuracy costs: baselines at equal FLOPs, and a grid of Skip-Vision, on one base model."""

    model: BaseModelSection
    adapters: dict[str, AdapterSection] = Field(
        {"untuned": AdapterSection()}, min_length=1, description="under these labels"
    )
    test: str = Field(
        "data/shapes/test.json", description="rows that are asked: LLaVA JSON, JSONL or parquet"
    )
    rows: int = Field(300, ge=1, description="rows asked at most, the tasks in equal shares")
    batch_size: int = Field(50, ge=1, description="rows per forward pass")
    max_new_tokens: int = Field(96, ge=1, description="tokens of an answer, at most")
    methods: tuple[str, ...] = Field(tuple(BASELINES), description="of skipvision.baselines")
    fractions: tuple[float, ...] = Field(
        (0.25, 0.3, 0.5), description="shares of the full prefill FLOPs, without the vision tower, to spend"
    )
    grid: GridSection = GridSection()
    latency_rounds: int = Field(
        9, ge=0, description="times that the first token is waited for at each point; 0 = not measured"
    )
    cpus_per_task: float = Field(1, gt=0, description="CPUs of a Ray task, each of which scores one point")
    report: str | None = Field(None, description="folder that also gets the table and the pictures")

    @field_validator("adapters")
    @classmethod
    def _first_seed(cls, value: dict[str, AdapterSection]) -> dict[str, AdapterSection]:
        if wrong := [label for label, one in value.items() if one.other_seeds and one.path is None]:
            raise ValueError(f"{', '.join(wrong)}: other_seeds without a path, which is the first")
        return value

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in value if name not in BASELINES]:
            raise ValueError(f"no {', '.join(unknown)}; there are {', '.join(BASELINES)}")
        return value

    @field_validator("fractions")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [share for share in value if not 0 < share <= 1]:
            raise ValueError(f"{wrong}: shares are above 0 and at most 1")
        return value

    @model_validator(mode="after")
    def _references(self) -> Self:
        for label, adapter in self.adapters.items():
            reference = self.adapters.get(adapter.reference or label)
            if reference is None:
                raise ValueError(
                    f"adapters.{label}.reference: no adapter {adapter.reference!r}; there are "
                    f"{', '.join(self.adapters)}"
                )
            own, theirs = len(adapter.other_seeds), len(reference.other_seeds)
            if theirs not in (0, own):
                raise ValueError(
                    f"adapters.{label}: {own} other seeds, and {theirs} of {adapter.reference!r}, which it "
                    "is compared with seed by seed: give it as many, or none"
                )
        return self
