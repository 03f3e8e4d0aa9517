"""Model classes: encode as vLLM does, then prune, and give pruned tokens their positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch

from skipvision.errors import ConfigError
from skipvision.exporting.read import exported_settings, exported_summary
from skipvision.integrations.vllm import positions
from skipvision.integrations.vllm._compat import pass_positions_on_cpu
from skipvision.integrations.vllm.image_settings import FIELD, ImageSettings, from_tensors
from skipvision.integrations.vllm.reduction import reduce_images
from skipvision.integrations.vllm.startup import settings_of
from skipvision.summaries import SUMMARY
from skipvision.summary import SummaryLayer


class SkipModel:
    """Mixin for a model class of vLLM whose decoder has one position axis.

    Its position ids, if it keeps the original ones, come through vLLM's buffers for M-RoPE: three axes, of
    which the decoder gets the first.
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supports_mrope: ClassVar[bool] = True
    one_axis: ClassVar[bool] = True

    config: Any
    skip_summary: SummaryLayer | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        model_config = vllm_config.model_config
        settings = settings_of(model_config.hf_config)
        self._skip = settings
        carried = settings.positions != "none" and settings.refused is None
        if carried:
            # vLLM checks this before it reads positions from embeddings.
            model_config.multimodal_config.is_multimodal_pruning_enabled = _enabled
            pass_positions_on_cpu()
        with _positions_beyond(model_config, settings.positions == "shared"):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # The family's own pruning of videos stays off.
        self.is_multimodal_pruning_enabled = False
        self._skip_carries = carried
        self._skip_source = (model_config.model, model_config.revision)
        self._hidden_size = int(model_config.hf_text_config.hidden_size)
        layer = None
        if settings.summary_tokens:
            layer = SummaryLayer(self._hidden_size, settings.summary_tokens, dtype=torch.float32)
        setattr(self, SUMMARY, layer)

    @property
    def image_token_id(self) -> int:
        """Placeholder token of one visual token."""
        return int(getattr(self.config, "image_token_id", None) or self.config.image_token_index)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the model's weights, and those of the summary layer from its own file."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        layer = self.skip_summary
        if layer is None:
            return loaded
        exported = exported_settings(self.config)
        trained = exported_summary(self._skip_source[0], exported) if exported else None
        if trained is not None:
            layer.load_state_dict(trained.state_dict())
        return loaded | {f"{SUMMARY}.{name}" for name in layer.state_dict()}

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images and prune them."""
        values = kwargs.pop(FIELD, None)
        encoded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if values is None:
            return self._unpruned(encoded)
        images = from_tensors(values)
        features = list(encoded)
        _check_sizes(features, images)
        reduced = reduce_images(
            features, images, self.skip_summary, self._hidden_size, self._base_views(features, images)
        )
        if not self._skip_carries:
            return [image.embeds for image in reduced]
        relative = self._relative_positions(images, kwargs)
        return [
            positions.with_offsets(one.embeds, self._offsets(own.to(one.source.device), one.source, image))
            for one, own, image in zip(reduced, relative, images, strict=True)
        ]

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """Take positions out of embeddings that enter the decoder now. vLLM calls it in each step."""
        parts = [positions.split_offsets(image, self._width(image)) for image in multimodal_embeddings]
        offsets = [offset for _, offset in parts if offset is not None]
        placed = mrope_positions
        if offsets:
            visual = torch.as_tensor(input_ids) == self.image_token_id
            placed = positions.place(mrope_positions, visual, num_computed_tokens, offsets)
        return [embeds for embeds, _ in parts], placed, positions.shift_of(placed, self.one_axis)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Number a prompt before its images are encoded: text has its final positions, images their start."""
        # A full image needs no span: its tokens are numbered like text, with any tokens between them.
        spans = [span for _, image, span in _spans(mm_features) if not image.is_full]
        return positions.number_prompt(len(input_tokens), spans)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        own = positions[0] if self.one_axis and positions.ndim == 2 else positions
        return super().forward(  # type: ignore[misc]
            input_ids, own, intermediate_tensors=intermediate_tensors, inputs_embeds=inputs_embeds, **kwargs
        )

    def _unpruned(self, encoded: Any) -> Any:
        """Videos: their tokens stay where they are."""
        if not self._skip_carries or not self.one_axis:
            return encoded
        return [
            positions.with_offsets(one, torch.zeros(1, len(one), dtype=torch.long, device=one.device))
            for one in encoded
        ]

    def _offsets(self, relative: torch.Tensor, source: torch.Tensor, image: ImageSettings) -> torch.Tensor:
        if self.one_axis and image.is_full:
            return torch.zeros(1, len(source), dtype=torch.long, device=source.device)
        if image.config.positions == "contiguous":
            return torch.arange(len(source), device=source.device)[None]
        return relative[:, source]

    def _width(self, embeds: torch.Tensor) -> int:
        """Columns of an embedding without its positions."""
        return self._hidden_size

    def _base_views(
        self, features: list[torch.Tensor], images: list[ImageSettings]
    ) -> list[torch.Tensor] | None:
        """(N,) for each image, True at tokens of the whole image's view."""
        return None

    def _relative_positions(self, images: list[ImageSettings], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """(A, N) for each image: position ids of its tokens, relative to the first."""
        return [torch.arange(image.tokens)[None] for image in images]


class SkipMRoPEModel(SkipModel):
    """Mixin for a model class of vLLM whose decoder has M-RoPE."""

    one_axis: ClassVar[bool] = False

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """Number the unpruned prompt as the family does, and take the positions of the tokens that stay.

        Tokens of an image get the position of its first until `recompute_mrope_positions` knows better.
        """
        whole: list[int] = []
        index: list[int] = []
        spans = {id(feature): (image, span) for feature, image, span in _spans(mm_features)}
        features, done = [], 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            if id(feature) not in spans:
                features.append(_moved(feature, len(whole) - done, 0))
                continue
            image, span = spans[id(feature)]
            features.append(_moved(feature, len(whole) - done, image.tokens - span.kept))
            index.extend(range(len(whole), len(whole) + span.begin - done))
            whole.extend(input_tokens[done : span.begin])
            index.extend([len(whole)] * span.kept)
            whole.extend([self.image_token_id] * image.tokens)
            done = span.begin + span.kept
        index.extend(range(len(whole), len(whole) + len(input_tokens) - done))
        whole.extend(input_tokens[done:])
        numbered, shift = super(SkipModel, self).get_mrope_input_positions(whole, features)  # type: ignore[misc]
        return numbered[:, index].contiguous(), shift + len(whole) - len(input_tokens)


def _enabled() -> bool:
    return True


@contextmanager
def _positions_beyond(model_config: Any, wanted: bool) -> Iterator[None]:
    """Build the decoder with a table of angles that no generated token can exceed.

    A prompt's original positions stay below ``max_position_embeddings`` (`SkipProcessor` checks), and an
    answer adds less than ``max_model_len`` to them.
    """
    text = model_config.hf_text_config
    known = getattr(text, "max_position_embeddings", None)
    if not wanted or known is None:
        yield
        return
    text.max_position_embeddings = known + model_config.max_model_len
    try:
        yield
    finally:
        text.max_position_embeddings = known


def _spans(mm_features: Sequence[Any]) -> list[tuple[Any, ImageSettings, positions.Span]]:
    """Return the images of a prompt in order, with their settings and tokens."""
    found = []
    for feature in mm_features:
        if feature.modality != "image":
            continue
        if feature.data is None or FIELD not in feature.data:
            raise ConfigError("an image reached the worker without the settings of Skip-Vision")
        image = ImageSettings.from_tensor(feature.data[FIELD].data)
        placed = feature.mm_position
        mask = placed.is_embed
        begin = placed.offset + (int(mask.nonzero()[0]) if mask is not None else 0)
        found.append((feature, image, positions.Span(begin, placed.get_num_embeds(), image.span)))
    return sorted(found, key=lambda one: one[2].begin)


def _moved(feature: Any, shift: int, longer: int) -> Any:
    placed = feature.mm_position
    moved = replace(placed, offset=placed.offset + shift, length=placed.length + longer, is_embed=None)
    return replace(feature, mm_position=moved)


def _check_sizes(features: list[torch.Tensor], images: list[ImageSettings]) -> None:
    """Raise `ConfigError` if encoder and prompt disagree about an image."""
    encoded, expected = [len(one) for one in features], [image.tokens for image in images]
    if encoded != expected:
        raise ConfigError(f"images of {expected} visual tokens were encoded to {encoded}")
