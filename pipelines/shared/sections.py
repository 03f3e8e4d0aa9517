"""What the settings of several jobs share."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Part of a job's settings: frozen, no unknown fields, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class JobConfig(Section):
    """A job that has a folder, and can be continued there."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the job's name: its folder, and its name in MLflow",
    )
    storage: str = Field(
        "runs",
        description="folder for all runs, seen by every node; a relative path starts at $SKIPVISION_HOME or, "
        "outside of Ray jobs, in the working directory",
    )


class EngineSection(Section):
    """One engine, which writes many answers at once; arguments of `skipvision.Engine`."""

    max_sequences: int = Field(16, ge=1, description="answers written at once, at most")
    kv_budget_bytes: int = Field(
        2**30, ge=1, description="bytes for the keys and values of all answers being written"
    )
    prefill_tokens: int = Field(
        4096, ge=1, description="prompt tokens read in one step, at most, while others are being written"
    )
    prefix_cache_bytes: int = Field(
        0,
        ge=0,
        description="bytes for images that several requests ask about, to read them once; 0 = none",
    )
    compile_decoding: bool = Field(
        False, description="compile the steps that write: a minute at the start, less for each token then"
    )


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
