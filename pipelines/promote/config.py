"""The settings of a promotion."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.evaluation.gate import Budget
from pipelines.shared.paths import ArtifactPath, OutputPath
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.names import AliasName


class ItemsSection(Section):
    """The scored items of one side."""

    items: ArtifactPath = Field(
        description="items.parquet of a scoring job, or runs:/RUN_ID of its MLflow run"
    )
    system: str | None = Field(
        None, description="label of the system in the file; null = the one that matches the model"
    )


class CandidateSection(ItemsSection):
    """The model version to promote, with its items."""

    model: str = Field(
        description="models:/NAME/VERSION, models:/NAME@ALIAS, or the runs:/RUN_ID that registered it"
    )


class ReferenceSection(ItemsSection):
    """The system that the candidate must not be worse than, with its items."""

    against: Literal["champion", "full"] = Field(
        "champion", description="the version that holds the alias, or the model with full tokens"
    )


class PromoteConfig(Section):
    """A promotion: the alias moves to the candidate if every slice stays within its budget."""

    candidate: CandidateSection
    reference: ReferenceSection
    alias: AliasName = Field("champion", description="alias that moves to the candidate if it passes")
    budget: Budget = Budget()
    storage: OutputPath = Field(
        "runs", description="folder of runs, with MLflow's database if tracking.uri is null"
    )
    tracking: TrackingConfig = TrackingConfig()
