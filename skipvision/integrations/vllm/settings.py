"""Which SkipConfig applies to a request, and which ones vLLM cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from transformers import PretrainedConfig

from skipvision.config import SkipConfig
from skipvision.errors import ConfigError
from skipvision.integrations.vllm.equal_cost import without_skipped
from skipvision.registry import is_built_in

KEYWORD = "skip"
"""Key of ``mm_processor_kwargs``, for the server and for a request."""
MAP_SKIPPED = "map_skipped"
"""Key next to the fields of a SkipConfig: replace skipped tokens by retained ones of equal FLOPs."""

Positions = Literal["own", "shared", "none"]
"""Where position ids of pruned images come from: the family's M-RoPE, our use of vLLM's M-RoPE buffers for a
family with one axis, or vLLM's count of tokens, which knows only positions="contiguous"."""


@dataclass(frozen=True)
class Settings:
    """The server's settings for requests, resolved once at start-up.

    Attributes:
        default: SkipConfig of requests that name none.
        map_skipped: whether skipped tokens are replaced by retained ones of equal FLOPs.
        summary_tokens: K of the model's summary layer; 0 = it has none.
        positions: how position ids of a pruned image reach the decoder.
        views: the family orders visual tokens by view (select="views").
        refused: why this server prunes no images; None = it does.
        encoder_tokens: tokens that vLLM's cache of encoded images holds at least; 0 = unknown.
    """

    default: SkipConfig
    map_skipped: bool = False
    summary_tokens: int = 0
    positions: Positions = "none"
    views: bool = False
    refused: str | None = None
    encoder_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, for `from_json`."""
        return {**asdict(self), "default": self.default.model_dump()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read the settings that start-up left in the model's config."""
        return cls(**{**values, "default": SkipConfig(**values["default"])})

    def of_request(self, value: object, model: PretrainedConfig) -> SkipConfig:
        """Return the SkipConfig of a request.

        Args:
            value: ``mm_processor_kwargs["skip"]`` of the request: None, "full", or fields that replace those
                of the default.
            model: the model's config, for the cost of skipped tokens.

        Raises:
            ConfigError: a value is invalid, or vLLM cannot run the configuration.
        """
        if value is None:
            return self.default
        config, mapped = merged(self.default, value, self.map_skipped)
        return self.checked(config, model, mapped)

    def checked(self, config: SkipConfig, model: PretrainedConfig, map_skipped: bool) -> SkipConfig:
        """Return a configuration that vLLM can run: itself, or mapped where that is allowed.

        Raises:
            ConfigError: it cannot run.
        """
        self._check_methods(config)
        if config.is_full:
            return SkipConfig.full()
        if self.refused is not None:
            raise ConfigError(f"this server prunes no images, because {self.refused}")
        if config.skipped:
            config = _mapped(config, model, map_skipped)
        if config.summary_tokens not in (0, self.summary_tokens):
            layer = f"has {self.summary_tokens}" if self.summary_tokens else "has no summary layer"
            raise ConfigError(
                f"summary_tokens={config.summary_tokens}, but the model on this server {layer}: use "
                f"{' or '.join(map(str, sorted({0, self.summary_tokens})))}"
            )
        if config.positions == "original" and self.positions == "none":
            raise ConfigError(
                "positions='original', but this server numbers tokens contiguously (see its start-up log): "
                "use positions='contiguous'"
            )
        if config.positions == "contiguous" and self.positions == "own":
            raise ConfigError(
                "positions='contiguous' is not available for models with M-RoPE: rows and columns of the "
                "image would be lost. Use positions='original'"
            )
        return config

    def _check_methods(self, config: SkipConfig) -> None:
        if config.drop_after is not None:
            raise ConfigError(
                f"drop_after={config.drop_after}: in vLLM all layers have the same tokens: set it to null"
            )
        if config.size_bias and not config.is_full:
            raise ConfigError("size_bias=True: vLLM's paged attention takes no bias: set it to false")
        reads = config.criterion.reads
        if reads in ("decoder", "tower", "prompt"):
            raise ConfigError(
                f"select={config.select!r} reads the {'vision tower' if reads == 'tower' else reads}, which "
                "the vLLM plug-in does not: use 'similarity', 'diversity', 'norm', 'uniform' or 'random'"
            )
        if reads == "views" and not self.views:
            raise ConfigError(
                f"select={config.select!r}: this model sees one view of an image. Use 'similarity'"
            )
        for method in (config.criterion, config.merging):
            own = (self.default.criterion, self.default.merging)
            if not is_built_in(method) and method not in own:
                raise ConfigError(
                    f"{method.setting} belongs to another package, and an error in it would end the engine: "
                    "vLLM runs it only if the server's own configuration names it"
                )


def merged(base: SkipConfig, value: object, map_skipped: bool) -> tuple[SkipConfig, bool]:
    """Return a configuration whose fields a value replaces, and whether its skipped tokens are mapped.

    Raises:
        ConfigError: the value is not "full" or a mapping of fields, or a field is invalid.
    """
    if value == "full":
        return SkipConfig.full(), map_skipped
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"mm_processor_kwargs[{KEYWORD!r}]={value!r}: expected 'full' or an object with fields of a "
            "SkipConfig, such as {'retained': 64}"
        )
    fields = {str(name): field for name, field in value.items()}
    mapped = fields.pop(MAP_SKIPPED, map_skipped)
    if not isinstance(mapped, bool):
        raise ConfigError(f"{MAP_SKIPPED}={mapped!r}: expected true or false")
    try:
        return SkipConfig(**{**base.model_dump(), **fields}), mapped
    except ConfigError as error:
        raise ConfigError(f"mm_processor_kwargs[{KEYWORD!r}]: {error}") from error


def _mapped(config: SkipConfig, model: PretrainedConfig, allowed: bool) -> SkipConfig:
    """Return a configuration of equal FLOPs without skipped tokens; raise `ConfigError` if not allowed."""
    equal = without_skipped(config, model)
    if equal is not None and allowed:
        return equal
    number, remedy = "", "use skipped=0"
    if equal is not None:
        number = f" The same FLOPs pay for retained={equal.retained}, skipped=0."
        remedy = f"use these, or {MAP_SKIPPED}=true to have them applied"
    raise ConfigError(
        f"skipped={config.skipped!r}: in vLLM every token takes the whole decoder, so none can bypass the "
        f"feed-forward networks.{number} To run in vLLM, {remedy}"
    )
