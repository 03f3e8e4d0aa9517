"""Sections that the settings of several jobs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from pipelines.shared.paths import OutputPath, output_path, resolve_paths


class Section(BaseModel):
    """Part of a job's settings: frozen, without unknown fields or infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def resolved(self) -> Self:
        """Return a copy in which every path is absolute, as processes on other nodes need it.

        Raises:
            ConfigError: lists every path that does not exist or cannot be used.
        """
        return resolve_paths(self)


class JobConfig(Section):
    """Settings of a job that has a folder and can be resumed there."""

    name: str = Field(
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the job, of its folder and, if the job is tracked, of its MLflow run",
    )
    storage: OutputPath = Field(
        "runs",
        description="folder for all runs, seen by every node; a relative path starts at $SKIPVISION_HOME or, "
        "outside of Ray jobs, in the working directory",
    )

    @property
    def storage_path(self) -> Path:
        """The absolute folder of all runs."""
        return output_path(self.storage, "storage")


class EngineSection(Section):
    """One engine, which generates several answers at once; arguments of `skipvision.Engine`."""

    max_sequences: int = Field(16, ge=1, description="max answers generated at once")
    kv_budget_bytes: int = Field(
        2**30, ge=1, description="bytes for the keys and values of all answers being generated"
    )
    prefill_tokens: int = Field(
        4096, ge=1, description="max prompt tokens processed in one step while other answers are generated"
    )
    prefix_cache_bytes: int = Field(
        0,
        ge=0,
        description="bytes for the images that several requests share, so that each is processed once; "
        "0 = none",
    )
    compile_decoding: bool = Field(
        False, description="compile the decoding steps: a minute at the start, less time per token later"
    )
    pack_weights: bool = Field(
        True,
        description="hold bfloat16 weights in the layout that the CPU reads fastest; no effect in float32, "
        "on GPUs, on CPUs that do not multiply bfloat16, with compile_decoding, and on vLLM",
    )


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one mapping with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
