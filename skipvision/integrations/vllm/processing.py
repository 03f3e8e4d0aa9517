"""Placeholders: each image gets as many tokens in the prompt as its plan keeps, before it is encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.multimodal.encoder_budget import get_mm_max_toks_per_item
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from skipvision.config import SkipConfig
from skipvision.errors import ConfigError, InputError
from skipvision.integrations.vllm.image_settings import FIELD, ImageSettings
from skipvision.integrations.vllm.settings import KEYWORD, Settings
from skipvision.integrations.vllm.startup import settings_of

_IMAGE = "image"
_REMEMBERED = 2**16
"""Images whose size a processor remembers."""


class SkipInfo:
    """Mixin for a family's ``BaseProcessingInfo``: profiling counts the tokens that the default keeps."""

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int] | None:
        most: Mapping[str, int] | None = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        if most is None or _IMAGE not in most:
            return most
        default = settings_of(self.get_hf_config()).default  # type: ignore[attr-defined]
        return {**most, _IMAGE: default.counts(most[_IMAGE]).total}


class SkipProcessor:
    """Mixin for a family's ``BaseMultiModalProcessor``.

    The request's SkipConfig replaces its ``mm_processor_kwargs["skip"]`` as JSON with every field. vLLM
    hashes these arguments with each image, so caches of images, of their encodings, and of prefixes tell two
    configurations of one image apart.
    """

    info: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spans: OrderedDict[str, int] = OrderedDict()

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        hf_config = self.info.get_hf_config()
        settings = settings_of(hf_config)
        config = settings.of_request(inputs.hf_processor_mm_kwargs.get(KEYWORD), hf_config)
        kwargs = {**inputs.hf_processor_mm_kwargs, KEYWORD: config.model_dump_json()}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]
        if settings.positions == "own" and not settings.refused:
            _check_end(result)
        elif settings.positions == "shared":
            self._check_positions(result, config)
        self._check_size(result, config, settings)
        return result

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Any:
        """Shorten what replaces an image's placeholder, and attach the settings that the worker needs."""
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs
        )
        if not updates.get(_IMAGE):
            return updates
        config = SkipConfig.model_validate_json(str(hf_processor_mm_kwargs[KEYWORD]))
        shortened = []
        for index, image in enumerate(updates[_IMAGE]):
            contents = [_shortened(update.content, config) for update in image]
            shortened.append(
                [update.with_content(content) for update, (content, _) in zip(image, contents, strict=True)]
            )
            settings = ImageSettings(contents[0][1], config)
            out_mm_kwargs[_IMAGE][index][FIELD] = MultiModalFieldElem(
                data=settings.as_tensor(), field=MultiModalBatchedField(keep_on_cpu=True)
            )
        return {**updates, _IMAGE: shortened}

    def _check_positions(self, result: Any, config: SkipConfig) -> None:
        """Raise `InputError` if original positions would exceed those that the model knows."""
        limit = getattr(self.info.ctx.model_config.hf_text_config, "max_position_embeddings", None)
        if limit is None or config.positions != "original":
            return
        length, ranges = len(result["prompt_token_ids"]), result["mm_placeholders"].get(_IMAGE, [])
        items, keys = (result[name].get(_IMAGE, []) for name in ("mm_kwargs", "mm_hashes"))
        removed = sum(
            self._span(item, key, placed.get_num_embeds()) - placed.get_num_embeds()
            for item, key, placed in zip(items, keys, ranges, strict=True)
        )
        # vLLM itself refuses a prompt that is too long without them.
        if length <= limit < length + removed and length > sum(placed.length for placed in ranges):
            raise InputError(
                f"the prompt has {length} tokens, but with the {removed} that its images lost, its positions "
                f"reach {length + removed}; the model knows {limit}: use positions='contiguous'"
            )

    def _span(self, item: Any, key: str, unknown: int) -> int:
        """Return the positions of an image.

        vLLM's cache of processed images has no item for an image that it has sent to the engine before.
        """
        if item is not None:
            self._spans.pop(key, None)  # to the end
            self._spans[key] = ImageSettings.from_tensor(item[FIELD].data).span
        if len(self._spans) > _REMEMBERED:
            self._spans.popitem(last=False)
        return self._spans.get(key, unknown)

    def _check_size(self, result: Any, config: SkipConfig, settings: Settings) -> None:
        """Raise `InputError` for an image that vLLM's cache of encoded images cannot hold.

        vLLM sizes the cache for images under the server's default. Its own message (0.32) names an argument
        that does not change the size.
        """
        kept = max(
            (placed.get_num_embeds() for placed in result["mm_placeholders"].get(_IMAGE, [])), default=0
        )
        if not settings.encoder_tokens or kept <= settings.encoder_tokens or config == settings.default:
            return
        counts = {modality: 1 for modality, limit in self.info.allowed_mm_limits.items() if limit}
        limit = max(settings.encoder_tokens, *get_mm_max_toks_per_item(self, counts, None).values())
        if kept > limit:
            raise InputError(
                f"an image takes {kept} tokens, and this server holds {limit} tokens of encoded images: "
                f"lower retained, or start the server with max_num_batched_tokens={kept} or more"
            )


def _without(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != KEYWORD}


def _shortened(content: Any, config: SkipConfig) -> tuple[Any, int]:
    """Return the tokens of a pruned image in the prompt, and the number of its visual tokens unpruned."""
    mask = content.is_embed(content.full).tolist() if content.is_embed else [True] * len(content.full)
    tokens = sum(mask)
    if config.counts(tokens) == (tokens, 0, 0):
        return content, tokens
    begin = mask.index(True) if tokens else 0
    if not all(mask[begin : begin + tokens]):
        raise ConfigError("images with tokens between their visual tokens cannot be pruned in vLLM")
    kept = config.counts(tokens).total
    if not kept:
        raise ConfigError(f"skip keeps none of the {tokens} tokens of an image: raise retained")
    visual = content.full[begin : begin + 1] * kept
    full = [*content.full[:begin], *visual, *content.full[begin + tokens :]]
    return PromptUpdateDetails(full=full, is_embed=content.is_embed), tokens


def _check_end(result: Any) -> None:
    """Raise `InputError` if a prompt ends in an image, where M-RoPE could not number the answer."""
    ranges: Sequence[Any] = result["mm_placeholders"].get(_IMAGE, [])
    end = max((placed.offset + placed.length for placed in ranges), default=0)
    if end and end == len(result["prompt_token_ids"]):
        raise InputError("the prompt ends in an image: add text after it, such as the template's end token")
