"""`SkipConfig`: every choice that the method leaves open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
    model_validator,
)

from skipvision.errors import ConfigError
from skipvision.files import check_regular
from skipvision.merge import MERGES, Merge
from skipvision.problems import config_error
from skipvision.select import CRITERIA, Criterion
from skipvision.tokens import Counts

Select = Annotated[str, CRITERIA]
"""Name of a registered criterion."""
MergeName = Annotated[str, MERGES]
"""Name of a registered merge."""

Count = Annotated[int, Strict(), Field(ge=0)]
Switch = Annotated[bool, Strict()]
Fraction = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]


def _in_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers:
        raise ValueError("name at least one layer (skip_ffn=False bypasses no FFN)")
    return tuple(sorted({*layers}))


Layers = Annotated[tuple[Count, ...], AfterValidator(_in_order), PlainSerializer(list, return_type=list[int])]
"""Numbers of decoder layers, in order."""


class SkipConfig(BaseModel):
    """How the visual tokens of each image are selected, merged, summarised and skipped.

    Frozen. Wrong values raise a `ConfigError` that names all of them. ``SkipConfig.full()`` skips nothing.
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
    select: Select = Field(
        "similarity", description="criterion by which the retained tokens are chosen (docs/library.md)"
    )
    merge: MergeName = Field(
        "similarity", description="how the rest becomes the skipped tokens (docs/library.md)"
    )
    summary_tokens: Count = Field(
        1, le=1024, description="summary tokens K per group (retained, skipped); 0 = none"
    )
    skip_ffn: Switch = Field(True, description="skipped tokens bypass the feed-forward networks")
    skip_layers: Literal["all"] | Layers = Field(
        "all",
        description="decoder layers (from 0) whose feed-forward network skipped tokens bypass: all, or a "
        "list such as [2, 3]; they enter those of the others",
    )
    skip_kv: Switch = Field(True, description="skipped tokens leave the KV cache after prefill")
    drop_after: Count | None = Field(
        None,
        description="decoder layer (from 0) after which no visual token but the summaries is left, in the "
        "sequence and in the KV caches of later layers; null = all are",
    )
    size_bias: Switch = Field(
        False,
        description="attention adds log(s) to the score of a token that holds s visual tokens after merging, "
        "so that it weighs as much as they did",
    )
    positions: Literal["original", "contiguous"] = Field(
        "original", description="kept tokens keep their position ids, or are numbered without gaps"
    )
    layout: Literal["raster", "grouped"] = Field(
        "raster",
        description="kept tokens in image order, then their summaries; or "
        "[retained][its summary][skipped][its summary]",
    )
    probe_layer: Count = Field(
        0, description="decoder layer (from 0) that a criterion reads, such as 'ffn_ratio' or 'attention'"
    )
    seed: Count = Field(
        0, lt=2**63, description="seed of select='random', which applies one random pattern to all images"
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self), values) from error

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validate as pydantic does, but raise `ConfigError`."""
        with _as_config_error(cls, obj):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Validate as pydantic does, but raise `ConfigError` for wrong values and for invalid JSON."""
        with _as_config_error(cls, json_data):
            return super().model_validate_json(json_data, **options)

    @model_validator(mode="after")
    def _amounts_fit_the_merge(self) -> Self:
        if complaint := self.merging.check(self.merge, self.retained, self.skipped):
            raise ValueError(complaint)
        return self

    @classmethod
    def full(cls) -> Self:
        """Return the identity: every visual token is retained, and there is no summary."""
        return cls(retained=1.0, skipped=0.0, summary_tokens=0)

    @property
    def is_full(self) -> bool:
        """Whether the configuration leaves every image unchanged, as `full` does."""
        everything = isinstance(self.retained, float) and self.retained == 1.0
        return everything and not self.summary_tokens and self.drop_after is None

    @property
    def criterion(self) -> Criterion:
        """The criterion that ``select`` names."""
        return CRITERIA[self.select]

    @property
    def merging(self) -> Merge:
        """The merge that ``merge`` names."""
        return MERGES[self.merge]

    def counts(self, tokens: int) -> Counts:
        """Retained, skipped and summary tokens of an image of ``tokens`` visual tokens.

        An image smaller than ``retained + skipped`` fills the retained ones first.
        """
        retained = min(tokens, _resolve(self.retained, tokens))
        skipped = min(tokens - retained, _resolve(self.skipped, tokens))
        skipped = self.merging.fit(tokens, skipped)
        return Counts(retained, skipped, self.summary_tokens * ((retained > 0) + (skipped > 0)))

    def cached(self, tokens: int) -> int:
        """Tokens of such an image in the KV cache after prefill, of layers up to ``drop_after``."""
        counts = self.counts(tokens)
        return counts.total - counts.skipped * self.skip_kv

    def to_yaml(self) -> str:
        """Return the configuration as YAML with every field."""
        import yaml

        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read YAML as `to_yaml` returns it; missing fields take their defaults."""
        import yaml

        try:
            node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"YAML of a SkipConfig cannot be read: {error}") from error
        keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        return cls._from_fields(values, keys, f"YAML {text[:200]!r}")

    def to_json(self, path: str | Path) -> None:
        """Write the configuration to a JSON file with every field."""
        Path(path).write_text(json.dumps(self.model_dump(), indent=2) + "\n")

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a JSON file as `to_json` writes it; missing fields take their defaults."""
        keys: list[str] = []

        def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys.extend(key for key, _ in pairs)
            return dict(pairs)

        try:
            check_regular(path, or_descriptor=True)
            values = json.loads(Path(path).read_text(), object_pairs_hook=note)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a SkipConfig: {error}") from error
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
    """Convert a fraction to a count (at least 1 if above 0). Counts are returned unchanged."""
    if isinstance(amount, int):
        return amount
    return max(1, int(amount * tokens + 0.5)) if amount > 0 else 0
