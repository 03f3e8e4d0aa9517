"""Settings of tracking."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipelines.tracking.client import sqlite_file


class TrackingConfig(BaseModel):
    """Where runs are recorded, and under which names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = Field(
        None,
        description="MLflow tracking URI, e.g. http://server:5000; null = <storage>/mlflow.db, sqlite",
    )
    experiment: str = Field("skip-vision", description="MLflow experiment the run belongs to")

    def absolute_uri(self, storage: Path) -> str:
        """The URI to use; a sqlite file's relative path is taken from ``storage``, never from the cwd."""
        if self.uri is None:
            return f"sqlite:///{storage / 'mlflow.db'}"
        file = sqlite_file(self.uri)
        return self.uri if file is None else f"sqlite:///{storage / file}"


class TrainingTrackingConfig(TrackingConfig):
    """What else a run that makes an adapter records."""

    registered_model: str | None = Field(
        "skip-vision",
        description="name the adapter is registered under as a model version; null = not at all",
    )
    alias: str = Field("candidate", description="alias that moves to the newly registered version")
    system_metrics_seconds: float = Field(
        10.0, ge=0, description="seconds between samples of CPU, memory, disk, network and GPU use; 0 = none"
    )
