"""Everything a scoring job can be told."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipelines.caption.config import ScalingSection
from pipelines.engines.config import ModelSection
from pipelines.score.rules.judge_endpoint import JudgeConfig
from pipelines.shared.sections import EngineSection, JobConfig, Section
from pipelines.tracking.config import TrackingConfig
from skipvision.config import SkipConfig
from skipvision.engine.requests import Sampling

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SystemSection(Section):
    """One way of answering."""

    model: ModelSection
    skip: SkipConfig | Literal["full"] | None = Field(
        None,
        description="how visual tokens are skipped; null = as the adapter was trained; full, or null without "
        "an adapter = not at all",
    )


class DatasetSection(Section):
    """One table of questions."""

    name: Name = Field(
        description="VLMEvalKit's name, as MMBench_DEV_EN or MME; or Shapes; or any, with a rule"
    )
    path: str | None = Field(
        None, description="the TSV file; null = <name>.tsv in $LMUData or ~/LMUData, as VLMEvalKit has it"
    )
    rule: str | None = Field(
        None,
        description="for a dataset of your own: option | yes_or_no | yes_or_no_at_first | vqa | anls | "
        "relaxed | exact | contains | mathvista | judged | same_text; null = the benchmark's",
    )
    instruction: str | None = Field(
        None, description="asked behind each question; null = the rule's, empty = nothing"
    )
    limit: int | None = Field(None, ge=1, description="items taken from the beginning, at most; null = all")


class ScoreConfig(JobConfig):
    """A scoring job; one that is there already under its name is continued, or refused if it differs."""

    systems: dict[Name, SystemSection] = Field(min_length=1, description="what is compared, by label")
    reference: str = Field(
        "full", description="label of the system that the others are compared with: the one with full tokens"
    )
    datasets: list[DatasetSection] = Field(min_length=1, description="what is asked")
    sampling: Sampling = Field(Sampling(max_new_tokens=512), description="how answers are written")
    engine: EngineSection = EngineSection()
    shard_rows: int = Field(500, ge=1, description="answers that are written to disk together")
    max_error_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the job stops as soon as more than this share of a dataset's rows cannot be asked or "
        "scored, or the judge refuses or cannot be understood about so many",
    )
    judge: JudgeConfig | None = Field(
        None,
        description="reads free-form answers, and answers to multiple choice that name no option; null = "
        "none: MM-Vet cannot be scored, and what names no option is wrong",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals of differences")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples behind an interval")
    tracking: TrackingConfig = TrackingConfig()
    scaling: ScalingSection = ScalingSection()

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if self.reference not in self.systems:
            raise ValueError(
                f"reference = {self.reference!r} is none of the systems: {', '.join(self.systems)}"
            )
        names = [dataset.name for dataset in self.datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"datasets: {repeated[0]} is there twice")
        if self.sampling.n != 1 or self.sampling.logprobs is not None:
            raise ValueError("sampling.n and sampling.logprobs have no place where one text is scored")
        return self
