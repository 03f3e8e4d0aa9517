"""What is asked of the engine, and what it answers."""

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
    """How an answer is written. Frozen; wrong values raise `ConfigError` naming every one of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1, lt=2**31, description="most tokens of an answer")
    temperature: float = Field(0.0, ge=0, le=1e6, description="0 takes the likeliest token each time")
    top_p: float = Field(
        1.0, ge=0, le=1, description="likeliest tokens that have this probability together; one at least"
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="tokens that are drawn from; 0 = all")
    repetition_penalty: float = Field(
        1.0, gt=0, le=1e6, description="divides the logits of tokens in prompt and answer so far; 1 = none"
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="the same seed draws the same tokens whatever else is running"
    )
    stop: tuple[str, ...] = Field((), description="texts that end the answer and are left out of it")
    stop_token_ids: tuple[int, ...] = Field((), description="tokens that end it, beside the model's own")
    logprobs: int | None = Field(
        None, ge=0, le=100, description="likeliest tokens to report at each place, beside the one taken"
    )
    n: int = Field(1, ge=1, le=1024, description="answers to the same prompt")

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
            raise ValueError("an empty text would end every answer before it begins")
        return value


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt with its images.

    Attributes:
        prompt: text with the family's image placeholders, or chat messages for the processor's template.
        images: in the order of their placeholders.
        inputs: what `Engine.prepare` made of prompt and images: (1, T) ids and pixel tensors of this request.
            It can be made elsewhere (`prepare`), for example in a process that only reads images.
        sampling: how the answer is written.
        skip: the SkipConfig of this request; None = that of the adapter it names, or the engine's.
            "full" skips nothing.
        adapter: name of a PEFT adapter, or "__base__"; None = the one that was active when the engine
            was made.
        deadline: seconds after submission at which what is there is returned (finish_reason "deadline").
        adjust: makes, for each choice, what changes the (V,) logits of its next token given the ids written
            so far, at each token (constrained decoding).
        key: the caller's name for it; comes back with the completion.
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
                expected = "a SkipConfig, None or 'full'" if name == "skip" else f"a {kind}"
                raise ConfigError(f"{name}={value!r}: {expected} is expected")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"deadline={self.deadline!r}: seconds from submission, more than 0")


@dataclass(frozen=True)
class TokenLogprob:
    """One written token.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability under the model, before temperature and penalties.
        top: the likeliest tokens in its place with theirs, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One answer. ``text`` is without special tokens and without the stop text."""

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
        completion_tokens: written, all choices together.
        visual_total: visual tokens of its images.
        visual_retained: of these, on the full path.
        visual_skipped: on the short path, after merging.
        visual_cached: retained and summary tokens (all, without skip_kv) that the KV cache held.
        kv_bytes: keys and values of the prompt in the cache.
        prefix_hit: images and the text before them came from the prefix cache.
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
    """Seconds since submission: until its prefill began, until the first token, until the end."""

    queued: float
    first_token: float | None
    total: float


@dataclass(frozen=True, eq=False)
class Completion:
    """The end of a request.

    Attributes:
        request: the request as it was submitted.
        id: the engine's name for it.
        choices: one for each of ``sampling.n``.
        usage: tokens.
        timing: seconds.
        error: why it failed; then the choices hold what was written before.
    """

    request: Request
    id: int
    choices: tuple[Choice, ...]
    usage: Usage
    timing: Timing
    error: Exception | None = None

    @property
    def key(self) -> Any:
        """The caller's name for the request."""
        return self.request.key

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text if self.choices else ""


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one step added to one choice.

    Attributes:
        id: of the request.
        index: of the choice.
        text: new text; empty while a character or a possible stop text is incomplete.
        token_ids: new tokens.
        logprobs: theirs, if asked for.
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
