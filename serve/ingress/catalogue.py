"""The models and adapters that clients can name, and their cards at ``GET /v1/models``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.engines.loading import load_config, load_processor
from serve.chat.vocabulary import Vocabulary
from serve.config import ModelSection, ServeConfig
from serve.ingress.dispatch import Engines
from serve.ingress.rendering import Rendering
from serve.problem import Problem
from skipvision import SkipConfig
from skipvision.engine import BASE
from skipvision.exporting.read import exported_settings


class ServedModel:
    """One base model as an ingress needs it: all but the weights.

    Args:
        section: settings of the model.
        engines: the engines that run it.
        template_seconds: limit on rendering one prompt (s).

    Attributes:
        processor: Hugging Face processor.
        rendering: its chat template.
        vocabulary: tokens of its tokenizer.
        config: Hugging Face configuration.
        max_positions: longest sequence of prompt and answer (tokens).
        skip: SkipConfig of the base model: that of the settings or, if there is none, of an exported model.
    """

    def __init__(self, section: ModelSection, engines: Engines, template_seconds: float) -> None:
        self.section, self.engines = section, engines
        self.processor: Any = load_processor(section.path)
        self.rendering = Rendering(self.processor, template_seconds)
        self.vocabulary = Vocabulary(self.processor)
        self.config: Any = load_config(section.path)
        text = self.config.get_text_config()
        self.max_positions: int = getattr(text, "max_position_embeddings", None) or 2**31
        limit = section.engine.engine_kwargs.get("max_model_len")
        if isinstance(limit, int) and limit > 0:
            self.max_positions = min(self.max_positions, limit)
        exported = exported_settings(self.config)
        self.skip = section.skip or (None if exported is None else exported.skip)

    @property
    def renders_itself(self) -> bool:
        """Whether its engines tokenize prompts and process images themselves."""
        return self.section.engine.backend == "vllm"


@dataclass(frozen=True)
class Target:
    """The model and adapter that a client's name refers to.

    Attributes:
        model: the base model.
        adapter: name of the adapter; None = the base model alone.
    """

    model: ServedModel
    adapter: str | None

    @property
    def skip(self) -> SkipConfig | None:
        """The base model's SkipConfig. None for adapters, which have their own."""
        return self.model.skip if self.adapter is None else None

    def skip_for(self, requested: SkipConfig | Literal["full"] | None) -> SkipConfig | Literal["full"] | None:
        """Return the SkipConfig of a request; None = the adapter's own.

        The base model has the summary tokens of the deployment's settings unless the request names a count.
        """
        if not isinstance(requested, SkipConfig):
            return requested or self.skip
        if self.adapter is not None or "summary_tokens" in requested.model_fields_set:
            return requested
        summaries = self.skip.summary_tokens if self.skip else 0
        return requested.model_copy(update={"summary_tokens": summaries})


class Catalogue:
    """The models of a deployment by the names that clients use.

    Args:
        config: settings of the deployment.
        engines: the engines of each of ``config.models``.
    """

    def __init__(self, config: ServeConfig, engines: Sequence[Engines]) -> None:
        sections = zip(config.models, engines, strict=True)
        self.models = [
            ServedModel(section, each, config.limits.template_seconds) for section, each in sections
        ]
        self._targets = {
            name: Target(self.models[number], adapter) for name, (number, adapter) in config.served().items()
        }
        self._created = int(time.time())

    def target(self, name: str) -> Target:
        """Return what a name refers to. Raise `Problem` (404) if there is no such model."""
        target = self._targets.get(name)
        if target is None:
            raise Problem(
                404,
                f"the model {name!r} does not exist; there are {', '.join(self._targets)}",
                param="model",
                code="model_not_found",
            )
        return target

    def cards(self) -> list[dict[str, Any]]:
        """Return OpenAI's model object for every name."""
        return [self._card(name) for name in self._targets]

    async def details(self, name: str) -> dict[str, Any]:
        """Return a model's card with its source and SkipConfig; the settings' where no engine has replied."""
        target = self.target(name)
        section, adapter, skip = target.model.section, target.adapter, target.skip
        source = section.path if adapter is None else section.adapters[adapter]
        served = await target.model.engines.served()
        if served is not None:
            if adapter in served.missing:
                reason = served.missing[adapter]
                return {**self._card(name), "source": source, "skip": None, "not_loaded": reason}
            source = served.adapters.get(adapter or BASE, source)
            skip = skip or served.skip[adapter or BASE]
        return {**self._card(name), "source": source, "skip": skip}

    def _card(self, name: str) -> dict[str, Any]:
        target = self._targets[name]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "skipvision",
            "parent": None if target.adapter is None else target.model.section.served_name,
        }
