"""Everything a promotion can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.evaluation.gate import Budget
from pipelines.shared.paths import ArtifactPath, OutputPath
from pipelines.shared.sections import Section
from pipelines.tracking.config import TrackingConfig


class ItemsSection(Section):
    """Scored items of one system."""

    items: ArtifactPath = Field(
        description="items.parquet of a scoring job, or runs:/RUN_ID of its MLflow run"
    )
    system: str | None = Field(
        None, description="label of the system there; null = the one that is what is needed"
    )


class CandidateSection(ItemsSection):
    """What is to be promoted."""

    model: str = Field(
        description="models:/NAME/VERSION, models:/NAME@ALIAS, or the runs:/RUN_ID that made it"
    )


class ReferenceSection(ItemsSection):
    """What it must not be worse than."""

    against: Literal["champion", "full"] = Field(
        "champion", description="the version that holds the alias, or the model with full tokens"
    )


class PromoteConfig(Section):
    """One decision."""

    candidate: CandidateSection
    reference: ReferenceSection
    alias: str = Field("champion", description="alias that moves to the candidate if it passes")
    budget: Budget = Budget()
    storage: OutputPath = Field(
        "runs", description="folder of runs, with MLflow's database if tracking.uri is null"
    )
    tracking: TrackingConfig = TrackingConfig()
