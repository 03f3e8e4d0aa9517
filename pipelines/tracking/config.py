"""The tracking section of the jobs' settings."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipelines.shared.sections import JobConfig
from pipelines.tracking.client import sqlite_file, sqlite_uri
from pipelines.tracking.names import AliasName, ExperimentName, ModelName


class TrackingConfig(BaseModel):
    """Where a job's MLflow run is recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = Field(
        None,
        description="MLflow tracking URI, e.g. http://server:5000; null = <storage>/mlflow.db, sqlite",
    )
    experiment: ExperimentName = Field("skip-vision", description="MLflow experiment the run belongs to")

    def absolute_uri(self, storage: Path) -> str:
        """Return the URI to connect to; a relative sqlite file starts at ``storage``."""
        if self.uri is None:
            return sqlite_uri(storage / "mlflow.db")
        file = sqlite_file(self.uri)
        return self.uri if file is None else sqlite_uri(storage / file)


class TrainingTrackingConfig(TrackingConfig):
    """Where a fine-tuning run is recorded, and under which name its adapter is registered."""

    registered_model: ModelName | None = Field(
        "skip-vision",
        description="name of the registered model that the adapter becomes a version of; null = none",
    )
    alias: AliasName = Field("candidate", description="alias that moves to the new version")
    system_metrics_seconds: float = Field(
        10.0, ge=0, description="seconds between samples of CPU, memory, disk, network and GPU use; 0 = none"
    )


class TrackedConfig(JobConfig):
    """Settings of a job that has a folder and is recorded in MLflow."""

    tracking: TrackingConfig = TrackingConfig()
