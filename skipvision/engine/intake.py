"""From a request to a sequence group that the scheduler can queue."""

from __future__ import annotations

from collections import abc
from itertools import count
from typing import Any

from skipvision.attach import Attachment
from skipvision.config import SkipConfig
from skipvision.engine.adapters import Adapters
from skipvision.engine.model import ModelFacts
from skipvision.engine.prompts import Prompt, prepare
from skipvision.engine.requests import Request
from skipvision.engine.sequences import SequenceGroup
from skipvision.errors import ConfigError, InputError


class Intake:
    """Prepares requests, and decides the SkipConfig and adapter that each runs under.

    Args:
        processor: the model's processor; None = requests come prepared, and answers have no text.
        facts: the model and its constants.
        attachment: Skip-Vision on the model.
        adapters: the loaded adapters, each with its SkipConfig.
        config: SkipConfig of requests that name neither a SkipConfig nor an adapter.
    """

    def __init__(
        self,
        processor: Any,
        facts: ModelFacts,
        attachment: Attachment,
        adapters: Adapters,
        config: SkipConfig,
    ) -> None:
        self._processor, self._facts = processor, facts
        self._attachment, self._adapters, self._config = attachment, adapters, config
        self._numbers = count()
        self._stop_token_ids = facts.generation.stop_token_ids(processor)
        if processor is None and facts.generation.stop:
            raise ConfigError(
                f"stop_strings={list(facts.generation.stop)} of this model's generation_config are found in "
                "texts, which an engine without a processor does not have: pass the processor"
            )

    def prepare(self, request: Request) -> Request:
        """Return the request with ``inputs``; raises `InputError`."""
        if request.inputs is None and self._processor is None:
            raise InputError(
                "this engine has no processor: create it with one, or prepare the requests before submitting"
            )
        return prepare(self._processor, request)

    def group(self, request: Request) -> SequenceGroup:
        """Return the sequence group of a request.

        Raises:
            InputError: the request cannot be prepared, or is longer than the model can read.
            ConfigError: its SkipConfig or adapter does not fit this model.
        """
        ready = self.prepare(request)
        adapter = request.adapter or self._adapters.default
        self._adapters.check(adapter)
        config = self._config_of(request)
        self._attachment.check(config)
        prompt = Prompt(ready.inputs or {}, self._facts.image_token_id, len(request.images))
        # On a GPU an unknown id would end the process, and with it all other requests.
        unknown = [token for token in prompt.ids if not 0 <= token < self._facts.vocabulary]
        if unknown:
            raise InputError(
                f"input_ids hold {unknown[0]}, but this model's vocabulary has {self._facts.vocabulary} "
                "tokens: prepare the request with this model's own processor"
            )
        sampling = self._facts.generation.complete(request.sampling, self._stop_token_ids)
        group = SequenceGroup(next(self._numbers), request, prompt, config, adapter, sampling, self._decode)
        new, limit = sampling.max_new_tokens, self._facts.max_positions
        if limit is not None and len(prompt) + new > limit:
            raise InputError(
                f"{len(prompt)} tokens of prompt and {new} of answer exceed the {limit} positions of this "
                "model: shorten the prompt, or lower max_new_tokens"
            )
        return group

    def _config_of(self, request: Request) -> SkipConfig:
        if isinstance(request.skip, SkipConfig):
            return request.skip
        return self._config if request.adapter is None else self._adapters.config_of(request.adapter)

    def _decode(self, ids: abc.Sequence[int]) -> str:
        if self._processor is None:
            return ""
        return str(self._processor.decode(list(ids), skip_special_tokens=True))
