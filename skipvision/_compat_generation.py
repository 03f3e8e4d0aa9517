"""Private names of transformers' `generate` that the package uses, and the version they were last seen in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

__all__ = ["GenerateOverride", "generation_position_ids", "generation_settings", "logits_processors"]


class GenerateOverride:
    """Replaces a model's `generate` by one that checks its arguments first, until it is removed.

    `generate` encodes images before it calls the model, so hooks of the model see the call too late to refuse
    it before any work.

    Args:
        model: that generates.
        check: takes the arguments by name.
    """

    def __init__(self, model: PreTrainedModel, check: Callable[[dict[str, Any]], None]) -> None:
        self._model, self._check = model, check
        self._earlier: Callable[..., Any] | None = vars(model).get("generate")
        object.__setattr__(model, "generate", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments and generate."""
        generate = self.__wrapped__
        self._check({**dict(zip(signature(generate).parameters, args, strict=False)), **kwargs})
        return generate(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The model's own method, whose signature `inspect` finds by this name."""
        if self._earlier is not None:
            return self._earlier
        cls: Any = type(self._model)
        method: Callable[..., Any] = cls.generate.__get__(self._model)
        return method

    def remove(self) -> None:
        """Give the model its method back."""
        if self._earlier is not None:
            object.__setattr__(self._model, "generate", self._earlier)
        elif vars(self._model).get("generate") is self:
            object.__delattr__(self._model, "generate")


def generation_settings(model: PreTrainedModel, given: Mapping[str, Any]) -> GenerationConfig:
    """Return the settings that `generate` uses for arguments: theirs, then those of the model, then defaults.

    Seen in: transformers 5.16 and 5.23.
    """
    generating: Any = model
    others = {name: value for name, value in given.items() if name != "generation_config"}
    settings: GenerationConfig = generating._prepare_generation_config(
        given.get("generation_config"), **others
    )[0]
    return settings


def generation_position_ids(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Return the position ids with which `generate` prefills a prompt.

    Args:
        model: that generates.
        input_ids: (B, T).
        model_kwargs: the model's other inputs, with ``past_key_values``.

    Returns:
        (B, T), or (A, B, T) for a model with A position axes.

    Seen in: transformers 5.23.
    """
    generating: Any = model
    return generating._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))


def logits_processors(
    model: PreTrainedModel,
    settings: GenerationConfig,
    prompt: torch.Tensor,
    further: Sequence[LogitsProcessor] = (),
) -> LogitsProcessorList:
    """Return what `generate` applies to the logits of each token, in its order.

    Args:
        model: that generates.
        settings: of the answer; ``max_length`` counts the prompt, too.
        prompt: (1, T) ids.
        further: applied before those of sampling, as `generate` applies its argument ``logits_processor``.

    Seen in: transformers 5.16 and 5.23.
    """
    generating: Any = model
    prepared: Any = copy(settings)
    eos = settings.eos_token_id
    prepared._eos_token_tensor = (
        None if eos is None else torch.tensor([eos] if isinstance(eos, int) else eos, device=prompt.device)
    )
    processors: LogitsProcessorList = generating._get_logits_processor(
        generation_config=prepared,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(further),
        device=prompt.device,
        model_kwargs={},
    )
    return processors
