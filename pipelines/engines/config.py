"""The model sections of the jobs' settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.shared.paths import ArtifactPath, ModelPath
from pipelines.shared.sections import Section


class BaseModelSection(Section):
    """A frozen base model: to fine-tune, or to measure."""

    path: ModelPath = Field(description="folder of the base model and its processor, or a Hugging Face id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of the frozen weights; auto = as stored, but half-precision weights are cast "
        "to the dtype of the arithmetic",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation"
    )


class ModelSection(Section):
    """The model of an engine: a base model with an optional adapter."""

    path: ModelPath = Field(description="folder of the base model and its processor, or a Hugging Face id")
    adapter: ArtifactPath | None = Field(
        None,
        description="trained adapter: a folder, or models:/NAME@ALIAS or models:/NAME/VERSION in MLflow; "
        "null = the base model alone",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of weights and arithmetic; auto = bfloat16 where the hardware multiplies it",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation"
    )
