"""Every choice of the method as a value: `SkipConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from skipvision.errors import ConfigError
from skipvision.problems import config_error

Select = Literal[
    "similarity",
    "ffn_ratio",
    "diversity",
    "norm",
    "views",
    "uniform",
    "random",
    "attention",
    "vision_attention",
]
Merge = Literal["similarity", "pool", "drop", "tome", "grid"]

Count = Annotated[int, Strict(), Field(ge=0)]
Switch = Annotated[bool, Strict()]
Fraction = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]


class SkipConfig(BaseModel):
    """How the visual tokens of each image are divided, merged, summarised, skipped and forgotten.

    Frozen; wrong values raise `ConfigError` naming every one of them. ``SkipConfig.full()`` skips nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    retained: Count | Fraction = Field(
        100,
        description="visual tokens per image on the full path: a count (int) or a fraction of N (0.0 … 1.0); "
        "in some families per tile of an image (docs/families.md)",
    )
    skipped: Count | Fraction = Field(
        156,
        description="visual tokens per image that bypass the FFN, after merging: a count, or a fraction of N",
    )
    select: Select = Field("similarity", description="criterion by which the retained tokens are chosen")
    merge: Merge = Field("similarity", description="how the rest becomes the skipped tokens")
    summary_tokens: Count = Field(
        1, le=1024, description="summary tokens K per group (retained, skipped); 0 = none"
    )
    skip_ffn: Switch = Field(True, description="skipped tokens bypass the feed-forward networks")
    skip_kv: Switch = Field(True, description="skipped tokens leave the KV cache after prefill")
    positions: Literal["original", "contiguous"] = Field(
        "original", description="survivors keep their position ids, or are numbered without gaps"
    )
    layout: Literal["raster", "grouped"] = Field(
        "raster",
        description="survivors in image order with the summaries behind them, or "
        "[retained][its summary][skipped][its summary]",
    )
    probe_layer: Count = Field(
        0, description="decoder layer (from 0) that select='ffn_ratio' and select='attention' read"
    )
    seed: Count = Field(
        0, lt=2**63, description="seed of select='random', whose one pattern of places serves all images"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self), values) from error

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's; wrong values raise `ConfigError`."""
        with _as_config_error(cls, obj):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's; wrong values, and what is not JSON, raise `ConfigError`."""
        with _as_config_error(cls, json_data):
            return super().model_validate_json(json_data, **options)

    @model_validator(mode="after")
    def _something_to_merge_into(self) -> Self:
        if self.skipped == 0 and self.merge in ("pool", "tome") and not _is_everything(self.retained):
            raise ValueError(
                f"merge={self.merge!r} makes the skipped tokens, but skipped=0; use merge='similarity' or "
                "'drop'"
            )
        if self.merge == "grid" and (self.retained != 0 or self.skipped == 0):
            raise ValueError(
                "merge='grid' makes the whole image smaller: use retained=0, and skipped for the tokens "
                f"of the smaller one (retained={self.retained!r}, skipped={self.skipped!r})"
            )
        if self.retained == 0 and self.skipped == 0 and self.merge != "drop":
            raise ValueError(
                f"retained=0 and skipped=0 leave nothing to merge into (merge={self.merge!r}): "
                "use merge='drop'"
            )
        return self

    @classmethod
    def full(cls) -> Self:
        """The identity: every visual token retained, no summary."""
        return cls(retained=1.0, skipped=0.0, summary_tokens=0)

    def counts(self, tokens: int) -> tuple[int, int]:
        """(N_r, N_s) for an image of ``tokens`` visual tokens; retained ones are served first.

        With merge='grid', N_s is what a grid of at most so many places has.
        """
        retained = min(tokens, _resolve(self.retained, tokens))
        skipped = min(tokens - retained, _resolve(self.skipped, tokens))
        if self.merge == "grid":
            rows = isqrt(skipped)
            skipped = rows * min(skipped // max(rows, 1), isqrt(tokens))
        return retained, skipped

    def to_yaml(self) -> str:
        """The configuration as YAML, every field written out."""
        import yaml

        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Inverse of `to_yaml`; missing fields take their defaults."""
        import yaml

        try:
            node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"a SkipConfig in YAML cannot be read: {error}") from error
        keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        return cls._from_fields(values, keys, f"YAML {text[:200]!r}")

    def to_json(self, path: str | Path) -> None:
        """Write the configuration to a JSON file, every field written out."""
        Path(path).write_text(json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Inverse of `to_json`; missing fields take their defaults."""
        keys: list[str] = []

        def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys.extend(key for key, _ in pairs)
            return dict(pairs)

        try:
            values = json.loads(Path(path).read_text(), object_pairs_hook=note)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: a SkipConfig cannot be read from it: {error}") from error
        return cls._from_fields(values, keys, str(path))

    @classmethod
    def _from_fields(cls, values: Any, keys: list[str], source: str) -> Self:
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: a SkipConfig is a mapping of fields, not {type(values).__name__}")
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(f"{source}: {', '.join(twice)} given more than once")
        return cls(**{str(name): value for name, value in values.items()})


@contextmanager
def _as_config_error(model: type[BaseModel], values: object) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        own = error.errors()[0].get("ctx", {}).get("error")
        raise (own if isinstance(own, ConfigError) else config_error(error, model, values)) from error


def _resolve(amount: int | float, tokens: int) -> int:
    """A count as it is; a positive fraction is at least one token."""
    if isinstance(amount, int):
        return amount
    return max(1, int(amount * tokens + 0.5)) if amount > 0 else 0


def _is_everything(amount: int | float) -> bool:
    return isinstance(amount, float) and amount == 1.0
