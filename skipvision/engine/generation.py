"""The generation settings that come with a model: applied to each answer as `generate` does, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from operator import index
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from skipvision._compat_generation import logits_processors
from skipvision.anatomy.families import lm_head
from skipvision.engine.requests import Adjust, Sampling
from skipvision.errors import ConfigError

MIN_TEMPERATURE = 1e-6
"""Smaller temperatures choose the likeliest token anyway, and would overflow."""


class _Refusal(NamedTuple):
    """A setting that the engine refuses.

    Attributes:
        reason: why.
        instead: the value to set.
        applies: whether a value other than None is refused.
    """

    reason: str
    instead: Any = None
    applies: Callable[[Any], bool] = lambda value: True


_ONE_BEAM = _Refusal("the engine follows one beam", 1, lambda number: number > 1)
_CONSTRAINED = _Refusal("constrained search needs beams")
_REFUSED = {
    "num_beams": _ONE_BEAM,
    "num_beam_groups": _ONE_BEAM,
    "constraints": _CONSTRAINED,
    "force_words_ids": _CONSTRAINED,
    "penalty_alpha": _Refusal(
        "contrastive search tries several tokens at each step", applies=lambda alpha: alpha > 0
    ),
    "dola_layers": _Refusal("DoLa reads the logits of several layers"),
    "guidance_scale": _Refusal(
        "guidance runs the model on a second prompt", applies=lambda scale: scale != 1
    ),
    "token_healing": _Refusal("token healing changes the prompt", False, bool),
    "max_time": _Refusal("requests have a deadline of their own, Request(deadline=…)"),
}
"""By the name of the setting."""

_REPLACED = {
    "do_sample": False,
    "temperature": 1.0,
    "max_length": 20,
    "max_new_tokens": None,
    "num_return_sequences": 1,
}
"""Settings that each request's `Sampling` replaces, also by its defaults, and the values of `generate`."""

_NEUTRAL = {"repetition_penalty": None, "top_k": None, "top_p": None, "temperature": None}


class GenerationSettings:
    """The ``generation_config`` of a model, applied to answers.

    A request's `Sampling` has priority, as arguments of `generate` have. ``temperature=0`` is
    ``do_sample=False``, any other one ``do_sample=True``.

    Args:
        model: whose ``generation_config`` is read once; later changes have no effect.

    Attributes:
        eos_token_ids: tokens that end any answer.
        suppressed_token_ids: tokens that are never generated.
        stop: strings that end any answer.
        allows_invalid_logits: whether NaN and infinite logits are replaced (``remove_invalid_values``).

    Raises:
        ConfigError: a setting that the engine cannot apply, or an invalid one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._config = model, copy(model.generation_config)
        config: Any = self._config
        for name in ("eos_token_id", "suppress_tokens"):
            setattr(config, name, _token_ids(config, name))
        self.eos_token_ids = frozenset(config.eos_token_id or ())
        self.suppressed_token_ids: list[int] = config.suppress_tokens or []
        self.stop = _stop_strings(config)
        self.allows_invalid_logits = config.remove_invalid_values is True
        check_generation_config(config)
        _warn_of_replaced(config)
        for drawn in (False, True):
            self._check_valid(drawn)
        self._processed = {drawn: self._has_more(drawn) for drawn in (False, True)}

    def complete(self, sampling: Sampling, stop_token_ids: tuple[int, ...] = ()) -> Sampling:
        """Return a request's settings with the model's values where the request has none.

        Args:
            sampling: of the request.
            stop_token_ids: as `stop_token_ids` returns them.
        """
        config: Any = self._config
        own = {
            "repetition_penalty": 1.0 if config.repetition_penalty is None else config.repetition_penalty,
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "top_k": config.top_k or 0,
        }
        missing = {name: value for name, value in own.items() if getattr(sampling, name) is None}
        if self.stop:
            missing["stop"] = (*sampling.stop, *self.stop)
            missing["stop_token_ids"] = (*sampling.stop_token_ids, *stop_token_ids)
        return sampling.model_copy(update=missing)

    def stop_token_ids(self, processor: Any) -> tuple[int, ...]:
        """Return the stop strings that are tokens of their own, which texts of answers leave out."""
        tokenizer = getattr(processor, "tokenizer", processor)
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
        return tuple(added[text] for text in self.stop if text in added)

    def processors(
        self, sampling: Sampling, prompt: Sequence[int], adjust: Adjust | None, device: torch.device
    ) -> LogitsProcessorList | None:
        """Return what `generate` would apply to the logits of an answer.

        Args:
            sampling: of the request, complete.
            prompt: ids of its prompt.
            adjust: the request's own change of the logits.
            device: of the logits.

        Returns:
            None if the model's settings add nothing to those that `Sampling` has.
        """
        if not self._processed[sampling.temperature > 0]:
            return None
        config = copy(self._config)
        # `update` would validate, and warn of sampling settings in each greedy answer.
        vars(config).update(
            do_sample=sampling.temperature > 0,
            temperature=max(sampling.temperature, MIN_TEMPERATURE),
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_length=len(prompt) + sampling.max_new_tokens,
        )
        further = [] if adjust is None else [_Adjusted(adjust, len(prompt))]
        return logits_processors(self._model, config, torch.tensor([list(prompt)], device=device), further)

    def _check_valid(self, drawn: bool) -> None:
        """Raise `ConfigError` if transformers cannot apply the settings to logits."""
        config, prompt = self._alone(drawn)
        vocabulary = cast(Any, lm_head(self._model)).weight.shape[0]
        try:
            logits = cast(Any, torch.zeros(1, vocabulary))
            logits_processors(self._model, config, prompt)(cast(Any, prompt), logits)
        except Exception as error:
            raise ConfigError(f"generation_config of this model is invalid: {error}") from error

    def _has_more(self, drawn: bool) -> bool:
        """Return whether the settings change logits in ways that `Sampling` does not have."""
        config, prompt = self._alone(drawn)
        vars(config).update(**_NEUTRAL, suppress_tokens=None)
        return len(logits_processors(self._model, config, prompt)) > 0

    def _alone(self, drawn: bool) -> tuple[GenerationConfig, torch.Tensor]:
        """Return the settings without a request's, and a prompt (1, 1) for them."""
        config = copy(self._config)
        vars(config).update(do_sample=drawn, temperature=None, max_length=2)
        return config, torch.zeros(1, 1, dtype=torch.long)


def _token_ids(config: Any, name: str) -> list[int] | None:
    """Return a setting that is None, a token id or several."""
    value = getattr(config, name)
    if value is None:
        return None
    with suppress(TypeError):
        return [index(value)]
    try:
        return [index(token) for token in value]
    except TypeError as error:
        raise _invalid(name, value, "a token id or a list of them") from error


def _stop_strings(config: Any) -> tuple[str, ...]:
    value = config.stop_strings
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise _invalid("stop_strings", value, "a string or a list of them")
    return tuple(strings)


def _invalid(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"generation_config of this model is invalid: {name}={value!r} must be {expected}, or None"
    )


class _Adjusted(LogitsProcessor):
    """Applies a request's ``adjust`` where `generate` applies processors that it is passed.

    Args:
        adjust: takes the generated ids and the (V,) logits of the next token.
        prompt: tokens of the prompt.
    """

    def __init__(self, adjust: Adjust, prompt: int) -> None:
        self._adjust, self._prompt = adjust, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the (1, V) logits after (1, T) ids of prompt and answer."""
        ids: list[int] = input_ids[0, self._prompt :].tolist()
        adjusted: Any = self._adjust(ids, scores[0])[None]
        return adjusted


def _warn_of_replaced(config: GenerationConfig) -> None:
    """Warn that `generate` would use settings which the engine leaves to requests."""
    values = {name: getattr(config, name, None) for name in _REPLACED}
    if not values["do_sample"]:
        values["temperature"] = None
    replaced = [f"{name}={value!r}" for name, value in values.items() if value not in (None, _REPLACED[name])]
    if replaced:
        warnings.warn(
            f"this model's generation_config has {', '.join(replaced)}, which generate applies. Here "
            "each request's Sampling decides, by default temperature=0 and max_new_tokens=64",
            stacklevel=5,
        )


def check_generation_config(config: GenerationConfig) -> None:
    """Raise one `ConfigError` that names all settings that the engine cannot apply."""
    problems = [
        f"{name}={value!r}: {refusal.reason}; set it to {refusal.instead}"
        for name, refusal in _REFUSED.items()
        if (value := getattr(config, name, None)) is not None and _applies(name, value, refusal)
    ]
    if problems:
        raise ConfigError(
            "the engine cannot apply this model's generation_config: " + "; ".join(problems) + " (in its "
            "generation_config.json or in model.generation_config), or call model.generate"
        )


def _applies(name: str, value: Any, refusal: _Refusal) -> bool:
    try:
        return refusal.applies(value)
    except TypeError as error:
        raise _invalid(name, value, "a number") from error
