"""Settings of the compare job."""

from __future__ import annotations

from pydantic import Field

from pipelines.shared.paths import InputPath, OutputPath
from pipelines.shared.sections import Section


class CompareConfig(Section):
    """Settings of a comparison: two finished fine-tuning runs of one base model, and the test rows."""

    full: str = Field("demo-full", description="name of the finished run with full tokens (skip: null)")
    skip: str = Field("demo", description="name of the finished run with Skip-Vision")
    storage: OutputPath = Field("runs", description="storage folder of both runs")
    test: InputPath = Field("data/shapes/test.json", description="test rows: LLaVA JSON, JSONL or parquet")
    rows: int = Field(600, ge=1, description="max test rows, in equal shares per task")
    batch_size: int = Field(50, ge=1, description="max answers that the engine generates at once")
    max_new_tokens: int = Field(96, ge=1, description="max tokens of an answer")
    kv_budget_bytes: int = Field(2**30, ge=1, description="bytes for keys and values of these answers")
    untuned: bool = Field(True, description="also evaluate the base model without an adapter")
    readme: OutputPath | None = Field(
        None,
        description="file to update: the table replaces the text between `<!-- demo table -->` and "
        "`<!-- /demo table -->`",
    )
    threads: int = Field(0, ge=0, description="torch threads; 0 = one per usable CPU")
