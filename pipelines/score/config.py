"""The settings of a scoring job."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipelines.caption.config import ScalingSection
from pipelines.engines.config import BackendSection, ModelSection
from pipelines.score.rules.judge_endpoint import JudgeConfig
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackedConfig
from skipvision.config import SkipConfig
from skipvision.engine.requests import Sampling

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SystemSection(Section):
    """A system: a model, with or without an adapter, under a SkipConfig."""

    model: ModelSection
    skip: SkipConfig | Literal["full"] | None = Field(
        None,
        description="SkipConfig; null = as the adapter was trained or the model exported, and otherwise no "
        "skipping; full = no skipping",
    )


class DatasetSection(Section):
    """A dataset: a table of questions with gold answers."""

    name: Name = Field(
        description="VLMEvalKit's name, such as MMBench_DEV_EN or MME; or Shapes; or any name, with a rule"
    )
    path: str | None = Field(
        None, description="the TSV file; null = <name>.tsv in $LMUData or ~/LMUData, as VLMEvalKit stores it"
    )
    rule: str | None = Field(
        None,
        description="for a dataset of your own: option | yes_or_no | yes_or_no_at_first | vqa | anls | "
        "relaxed | exact | contains | mathvista | judged | same_text; null = the benchmark's",
    )
    instruction: str | None = Field(
        None, description="follows each question; null = the rule's, empty = none"
    )
    limit: int | None = Field(None, ge=1, description="max items, taken from the beginning; null = all")


class ScoreConfig(TrackedConfig):
    """A scoring job. An existing job of the same name is continued; other settings are refused."""

    systems: dict[Name, SystemSection] = Field(min_length=1, description="the systems, by label")
    reference: str = Field(
        "full",
        description="label of the system that the others are compared with, usually the one with full tokens",
    )
    datasets: list[DatasetSection] = Field(min_length=1, description="the datasets")
    sampling: Sampling = Field(Sampling(max_new_tokens=512), description="how answers are generated")
    engine: BackendSection = BackendSection()
    shard_rows: int = Field(500, ge=1, description="answers per file on disk")
    max_error_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the job stops as soon as a larger share of a dataset's rows has an error: a row is "
        "unusable, or it has no answer or no readable verdict of the judge",
    )
    judge: JudgeConfig | None = Field(
        None,
        description="reads free-form answers, and multiple-choice answers that name no option; null = none: "
        "MM-Vet cannot be scored, and answers that name no option are wrong",
    )
    objects: dict[Name, tuple[str, ...]] = Field(
        {},
        description="names of objects by dataset, for datasets of captions: objects that a caption names and "
        "its gold caption does not are counted, and those that it misses; Shapes has its own",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="confidence level of all intervals")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples of an interval")
    scaling: ScalingSection = ScalingSection()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.reference not in self.systems:
            raise ValueError(
                f"reference = {self.reference!r} is none of the systems: {', '.join(self.systems)}"
            )
        names = [dataset.name for dataset in self.datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"datasets: {repeated[0]} occurs twice")
        if unknown := sorted(self.objects.keys() - set(names)):
            raise ValueError(f"objects: {unknown[0]!r} is none of the datasets: {', '.join(names)}")
        if empty := [name for name, words in self.objects.items() if not all(words) or not words]:
            raise ValueError(f"objects: {empty[0]}: give at least one word, and no empty ones")
        if self.sampling.n != 1 or self.sampling.logprobs is not None:
            raise ValueError(
                "sampling.n must be 1 and sampling.logprobs null: one text is scored per question"
            )
        return self
