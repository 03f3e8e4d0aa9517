"""The facts about a model that the engine needs, read from it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, cast

from torch import nn
from transformers import PreTrainedModel

from skipvision.anatomy.attention import block_indexer
from skipvision.anatomy.families import dissect, lm_head
from skipvision.anatomy.masks import Sight
from skipvision.cost import units
from skipvision.cost.running import Design
from skipvision.engine.generation import GenerationSettings
from skipvision.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """A model and its constants.

    Attributes:
        base: the Hugging Face model, without a PEFT wrapper.
        splits_prompts: whether a prompt may be prefilled in two parts, so that the first can be cached.
        batches_prompts: whether several prompts may be prefilled in one call.
        sight: the attention masks that its decoder expects.
        image_token_id: placeholder token of one visual token.
        vocabulary: number of token ids that the model can read.
        outputs: number of logits for each token.
        max_positions: longest sequence that the model can read, or None without a limit.
        entry_bytes: bytes of one entry of the KV cache, over all layers.
        layer_bytes: its bytes in each layer that has entries.
        text_config: the decoder's config.
        generation: settings that come with the model.
    """

    base: PreTrainedModel
    splits_prompts: bool
    batches_prompts: bool
    sight: Sight
    image_token_id: int
    vocabulary: int
    outputs: int
    max_positions: int | None
    entry_bytes: int
    layer_bytes: tuple[int, ...]
    text_config: Any
    generation: GenerationSettings

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Read the facts from a model, with or without PEFT.

        Raises:
            ConfigError: a setting of its ``generation_config`` that the engine cannot apply.
            UnsupportedModelError: the model cannot generate, or its family is not supported.
        """
        base = _generating_model(model)
        anatomy = dissect(model)
        element = next(anatomy.decoder.parameters()).element_size()
        layer_bytes = tuple(layer.values * element for layer in units.cache(Design.of(base.config)))
        # A cached prefix would need the states of recurrent layers after its last token.
        recurrent = any(layer.recurrent for layer in anatomy.layers)
        blocks = any(block_indexer(layer.attention) for layer in anatomy.layers)
        return cls(
            base=base,
            splits_prompts=not (anatomy.family.whole_prompt or recurrent),
            batches_prompts=not (anatomy.family.one_by_one or blocks),
            sight=Sight.of(anatomy.decoder),
            image_token_id=anatomy.image_token_id,
            # Some families have a placeholder that is no word.
            vocabulary=max(
                int(cast(Any, base.get_input_embeddings()).weight.shape[0]), anatomy.image_token_id + 1
            ),
            outputs=int(cast(Any, lm_head(base)).weight.shape[0]),
            max_positions=getattr(anatomy.text_config, "max_position_embeddings", None),
            entry_bytes=sum(layer_bytes),
            layer_bytes=layer_bytes,
            text_config=anatomy.text_config,
            generation=GenerationSettings(base),
        )


def _generating_model(model: nn.Module) -> PreTrainedModel:
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None or not base.can_generate():
        raise UnsupportedModelError(
            f"{type(model if base is None else base).__name__} cannot generate: load the model with "
            "AutoModelForImageTextToText.from_pretrained"
        )
    return base
