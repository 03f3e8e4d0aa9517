"""The settings of a calibration."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.engines.config import ModelSection
from pipelines.score.config import DatasetSection
from pipelines.shared.paths import InputPath
from pipelines.shared.sections import EngineSection, Section
from pipelines.tracking.config import TrackedConfig
from skipvision.config import SkipConfig

Cost = Literal["prefill_flops", "kv_bytes", "latency"]


class DataSection(DatasetSection):
    """Questions with gold answers, of which a part is held out to verify the result."""

    held_out: float = Field(
        0.5, gt=0, lt=1, description="share of the images that are only used for verification"
    )
    max_new_tokens: int = Field(96, ge=1, description="max tokens of an answer")


class PromptsSection(Section):
    """Images with prompts for strategy layers. The model with full tokens answers them."""

    path: InputPath = Field(
        description="file, pattern or fsspec URL of rows: LLaVA JSON, chat JSONL or parquet. Of each row, "
        "the first question is used; answers may be missing"
    )
    image_root: InputPath | None = Field(
        None, description="folder that relative image paths start at; null = the folder of the file of rows"
    )
    rows: int = Field(64, ge=2, description="rows that are drawn from the file, one per image")
    held_out: float = Field(
        0.25, gt=0, lt=1, description="share of these rows that is only used to verify the result"
    )
    max_new_tokens: int = Field(64, ge=1, description="max tokens of an answer")
    batch_size: int = Field(8, ge=1, description="rows per forward pass of a worker")


class LayersSection(Section):
    """The greedy search of strategy layers."""

    block: int = Field(
        1, ge=1, description="adjacent decoder layers that a move changes together; more = fewer measurements"
    )


class LimitsSection(Section):
    """The budget of the result. Costs are ratios to full tokens: 0.3 is 30 %."""

    accuracy_drop: float | None = Field(
        0.02,
        gt=0,
        le=1,
        description="largest drop of accuracy against full tokens, as a fraction; the cheapest config within "
        "it is chosen. null = the most accurate config within the limits on costs",
    )
    prefill_flops: float | None = Field(None, gt=0, description="largest ratio of predicted prefill FLOPs")
    kv_bytes: float | None = Field(None, gt=0, description="largest ratio of predicted KV cache bytes")
    latency: float | None = Field(None, gt=0, description="largest ratio of measured time to the first token")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="confidence level of the two-sided intervals for accuracy"
    )
    minimise: Cost = Field("prefill_flops", description="the cost that is minimised if accuracy_drop is set")

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if not self.on_costs and self.accuracy_drop is None:
            raise ValueError("set at least one of accuracy_drop, prefill_flops, kv_bytes and latency")
        return self

    @property
    def on_costs(self) -> dict[Cost, float]:
        """The limits on costs that are set, by cost."""
        given: dict[Cost, float | None] = {
            "prefill_flops": self.prefill_flops,
            "kv_bytes": self.kv_bytes,
            "latency": self.latency,
        }
        return {name: limit for name, limit in given.items() if limit is not None}


class SearchSection(Section):
    """Successive halving: each rung evaluates the configs left on more questions and keeps a share."""

    rungs: int = Field(3, ge=1, description="rungs; the last one uses all questions that are not held out")
    factor: int = Field(
        3,
        ge=2,
        description="a rung keeps 1/factor of the configs, and at least the finalists; the next one uses "
        "factor times as many questions",
    )
    finalists: int = Field(3, ge=1, description="max configs verified on the held-out images")
    latency_questions: int = Field(8, ge=1, description="questions for measuring the time to the first token")
    seed: int = Field(0, ge=0, description="seed of the split and of the bootstrap")


class ScalingSection(Section):
    """Ray resources; may change when a job is resumed."""

    workers: int = Field(1, ge=1, description="worker processes, each with the whole model")
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPUs of each worker; null = all, divided evenly"
    )
    gpus_per_worker: int | None = Field(
        None, ge=0, description="GPUs of each worker; null = one if the cluster has any, else none"
    )


class CalibrateConfig(TrackedConfig):
    """A calibration. An existing job of the same name is continued; other settings are refused."""

    model: ModelSection
    strategy: Literal["space", "layers"] = Field(
        "space",
        description="space = search the configs of `space` by the accuracy of answers (needs data); layers = "
        "find skip_layers and drop_after by the divergence from full tokens (needs prompts, no labels)",
    )
    data: DataSection | None = Field(None, description="questions with gold answers, for strategy space")
    prompts: PromptsSection | None = Field(None, description="images with prompts, for strategy layers")
    layers: LayersSection = LayersSection()
    skip: SkipConfig | None = Field(
        None, description="values of the fields that are not searched; null = the adapter's, or the defaults"
    )
    space: dict[str, list[Any]] = Field(
        {
            "retained": [0.0625, 0.125, 0.25, 0.5],
            "skipped": [0.0625, 0.25],
            "select": ["similarity", "diversity"],
        },
        description="fields of SkipConfig with their candidate values; all combinations are searched",
    )
    budget: LimitsSection = LimitsSection()
    search: SearchSection = SearchSection()
    engine: EngineSection = EngineSection()
    scaling: ScalingSection = ScalingSection()

    @field_validator("space")
    @classmethod
    def _check_space(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in value.items():
            if name not in SkipConfig.model_fields:
                raise ValueError(f"{name} is not a field of SkipConfig: {', '.join(SkipConfig.model_fields)}")
            if not values:
                raise ValueError(f"{name} has no values")
        if not value:
            raise ValueError("the space is empty: set at least one field with its values")
        return value

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        needed, other = ("data", "prompts") if self.strategy == "space" else ("prompts", "data")
        problems = []
        if getattr(self, needed) is None:
            problems.append(f"strategy = {self.strategy} needs the section {needed}")
        if getattr(self, other) is not None:
            problems.append(f"strategy = {self.strategy} does not read the section {other}: remove it")
        if self.strategy == "layers":
            if self.budget.prefill_flops is None:
                problems.append("strategy = layers needs budget.prefill_flops, for example 0.3")
            usual = LimitsSection()
            ignored = [
                f"budget.{name}"
                for name in LimitsSection.model_fields
                if name != "prefill_flops" and getattr(self.budget, name) != getattr(usual, name)
            ]
            fields = type(self).model_fields
            ignored += [name for name in ("space", "search") if getattr(self, name) != fields[name].default]
            if ignored:
                problems.append(f"strategy = layers does not read {', '.join(ignored)}: remove them")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def questions(self) -> DataSection:
        """The section ``data`` of strategy space."""
        if self.data is None:
            raise ValueError("strategy layers has no questions")
        return self.data

    @property
    def unlabelled(self) -> PromptsSection:
        """The section ``prompts`` of strategy layers."""
        if self.prompts is None:
            raise ValueError("strategy space has no prompts")
        return self.prompts
