"""Settings of the analysis job."""

from __future__ import annotations

from pydantic import Field

from pipelines.engines.config import BaseModelSection
from pipelines.shared.paths import InputPath, OutputFolder
from pipelines.tracking.config import TrackedConfig
from skipvision.config import SkipConfig


class AnalyseConfig(TrackedConfig):
    """The model and the rows to measure FFN ratios and skipping errors on."""

    model: BaseModelSection = Field(description="the base model")
    adapter: InputPath | None = Field(
        None, description="folder of a trained adapter, which is measured too; null = none"
    )
    skip: SkipConfig | None = Field(
        None,
        description="which visual tokens are retained; all others are skipped; null = as the adapter was "
        "trained",
    )
    data: InputPath = Field(description="rows to measure on: LLaVA JSON, chat JSONL or parquet")
    ratio_rows: int = Field(64, ge=1, description="rows for the FFN ratios, in equal shares per task")
    bound_rows: int = Field(4, ge=1, description="rows for the error and its bounds")
    batch_size: int = Field(8, ge=1, description="rows per forward pass")
    worst_case: bool = Field(
        True,
        description="also bound the error from spectral norms, which requires layers like those of Llama",
    )
    report: OutputFolder | None = Field(None, description="folder to copy the table and the figures to")
    threads: int = Field(0, ge=0, description="torch threads; 0 = one per usable CPU")
