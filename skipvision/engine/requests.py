"""The types of requests to the engine and of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from skipvision.config import SkipConfig
from skipvision.errors import ConfigError
from skipvision.problems import config_error

Message = Mapping[str, Any]
Inputs = Mapping[str, torch.Tensor]
Adjust = Callable[[list[int], torch.Tensor], torch.Tensor]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Sampling(BaseModel):
    """Settings of a request's decoding. Frozen; one `ConfigError` names all invalid values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1, lt=2**31, description="max tokens of an answer")
    temperature: float = Field(0.0, ge=0, le=1e6, description="0 always chooses the likeliest token")
    top_p: float = Field(
        1.0,
        ge=0,
        le=1,
        description="draw from the likeliest tokens with this total probability, at least one",
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="draw from this many of the likeliest tokens; 0 = all")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="divides the logits of tokens in the prompt and answer so far; 1 = no penalty",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="the same seed draws the same tokens, whatever else is running"
    )
    stop: tuple[str, ...] = Field((), description="strings that end the answer and are left out of it")
    stop_token_ids: tuple[int, ...] = Field(
        (), description="tokens that end the answer, besides the model's own"
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=100,
        description="number of likeliest tokens to report at each position, besides the chosen one",
    )
    n: int = Field(1, ge=1, le=1024, description="number of answers to the same prompt")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(error, type(self), values) from error

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would end every answer before it begins")
        return value


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its images.

    Attributes:
        prompt: text with the family's image placeholders, or chat messages for the processor's template.
        images: in the order of their placeholders.
        inputs: the processor's output for this prompt, (1, T) ids and pixel tensors; None = the engine runs
            its processor. Another process can prepare it (`skipvision.engine.prepare`).
        sampling: settings of the decoding.
        skip: SkipConfig of this request, or "full" to skip nothing; None = that of the adapter it names, or
            the engine's.
        adapter: name of a PEFT adapter, or "__base__"; None = the one that was active when the engine
            was created.
        deadline: seconds from submission; then the answer ends as generated so far (finish_reason
            "deadline").
        adjust: constrained decoding. Called once for each choice, it returns a function from the ids
            generated so far and the (V,) logits of the next token to new logits.
        key: any value of the caller's; returned with the completion.
    """

    prompt: str | Sequence[Message] = ""
    images: Sequence[Image.Image] = ()
    inputs: Inputs | None = None
    sampling: Sampling = field(default_factory=Sampling)
    skip: SkipConfig | Literal["full"] | None = None
    adapter: str | None = None
    deadline: float | None = None
    adjust: Callable[[], Adjust] | None = None
    key: Any = None

    def __post_init__(self) -> None:
        if self.skip == "full":
            object.__setattr__(self, "skip", SkipConfig.full())
        kinds = {"skip": SkipConfig | None, "sampling": Sampling, "inputs": Mapping | None}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                expected = "a SkipConfig, None or 'full'" if name == "skip" else str(kind)
                raise ConfigError(f"{name}={value!r}: expected {expected}")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"deadline={self.deadline!r}: expected a positive number of seconds")


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of one generated token.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability under the model, before temperature and penalties.
        top: ids and log probabilities of the likeliest tokens at its position, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One answer to a request. ``text`` excludes special tokens and the stop string."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: as the caller counts them, every visual token included.
        completion_tokens: generated, all choices together.
        visual_total: visual tokens of the images.
        visual_retained: visual tokens on the full path.
        visual_skipped: visual tokens on the short path, after merging.
        visual_cached: retained and summary tokens in the KV cache; without skip_kv, skipped ones too.
        kv_bytes: keys and values of the prompt in the KV cache.
        prefix_hit: whether the images and the text before them came from the prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_total: int = 0
    visual_retained: int = 0
    visual_skipped: int = 0
    visual_cached: int = 0
    kv_bytes: int = 0
    prefix_hit: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds from submission to the start of prefill, to the first token, and to the end."""

    queued: float
    first_token: float | None
    total: float


@dataclass(frozen=True, eq=False)
class Completion:
    """The result of a request.

    Attributes:
        request: as submitted.
        id: as returned by `Engine.submit`; −1 if the engine rejected the request.
        choices: one for each of ``sampling.n``.
        usage: token counts.
        timing: seconds.
        error: why the request failed; the choices then end where it failed.
    """

    request: Request
    id: int
    choices: tuple[Choice, ...]
    usage: Usage
    timing: Timing
    error: Exception | None = None

    @property
    def key(self) -> Any:
        """The ``key`` that the caller gave the request."""
        return self.request.key

    @property
    def text(self) -> str:
        """Text of the first choice; empty without choices."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens and text that one step added to one choice.

    Attributes:
        id: id of the request, as returned by `Engine.submit`.
        index: index of the choice.
        text: new text; empty while a character or a possible stop string is incomplete.
        token_ids: new tokens.
        logprobs: log probabilities of the new tokens, if requested.
        finish_reason: set on the choice's last chunk.
        completion: set on the request's last chunk.
    """

    id: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
