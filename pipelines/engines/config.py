"""The model sections of the jobs' settings."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.shared.paths import ArtifactPath, ModelPath
from pipelines.shared.sections import EngineSection, Section


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


class BackendSection(EngineSection):
    """One engine of this library or of vLLM."""

    backend: Literal["native", "vllm"] = Field(
        "native",
        description="the engine: native = skipvision.Engine; vllm = vLLM, with max_sequences and "
        "kv_budget_bytes as here (docs/captioning.md)",
    )
    engine_kwargs: dict[str, Any] = Field(
        {},
        description="with backend vllm: further arguments of its engine, such as tensor_parallel_size, "
        "max_model_len, quantization",
    )

    @model_validator(mode="after")
    def _arguments_of_vllm(self) -> Self:
        if self.engine_kwargs and self.backend == "native":
            raise ValueError("engine_kwargs are arguments of vLLM: set backend to vllm, or leave them out")
        return self


NATIVE_ENGINE = frozenset(f"engine.{name}" for name in EngineSection.model_fields)
"""Settings of an engine that do not change its answers, by their dotted names in a job's settings."""


def assume_native(state: dict[str, Any]) -> dict[str, Any]:
    """Return a job's ``run.json`` with the backend that earlier versions always had."""
    engine = state.get("config", {}).get("engine")
    if isinstance(engine, dict):
        engine.setdefault("backend", "native")
    return state
