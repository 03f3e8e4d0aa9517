"""Select, merge and summarise encoded images, with the library's own functions, before the decoder runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from skipvision.anatomy.images import Images
from skipvision.config import SkipConfig
from skipvision.integrations.vllm.image_settings import ImageSettings
from skipvision.merge import merge_tokens
from skipvision.planning import make_plan
from skipvision.summary import SummaryLayer
from skipvision.tokens import VisualTokens


class Reduced(NamedTuple):
    """The tokens of an image that enter the decoder.

    Attributes:
        embeds: (kept, X) their embeddings.
        source: (kept,) token of the encoded image whose position each takes.
    """

    embeds: torch.Tensor
    source: torch.Tensor


def reduce_images(
    features: Sequence[torch.Tensor],
    settings: Sequence[ImageSettings],
    summary: SummaryLayer | None,
    hidden_size: int,
    base_views: Sequence[torch.Tensor] | None = None,
) -> list[Reduced]:
    """Apply each image's SkipConfig; images with the same one are reduced in one batch.

    Args:
        features: (N, X) an encoded image each. The first ``hidden_size`` columns are its embeddings; further
            ones, which early layers add (DeepStack), are merged with them.
        settings: of each image.
        summary: the model's summary layer, if it has one.
        hidden_size: H, width of the decoder.
        base_views: (N,) tokens of the whole image's view, for select="views".
    """
    results: list[Reduced | None] = [None] * len(features)
    batches: dict[SkipConfig, list[int]] = {}
    for index, (image, one) in enumerate(zip(features, settings, strict=True)):
        if one.is_full:
            results[index] = Reduced(image, torch.arange(len(image), device=image.device))
        else:
            batches.setdefault(one.config, []).append(index)
    for config, members in batches.items():
        views = None
        if base_views is not None and config.criterion.reads == "views":
            views = pad_sequence([base_views[index] for index in members], batch_first=True)
        reduced = _batch([features[index] for index in members], config, summary, hidden_size, views)
        for index, one_reduced in zip(members, reduced, strict=True):
            results[index] = one_reduced
    return [result for result in results if result is not None]


@torch.no_grad()
def _batch(
    features: list[torch.Tensor],
    config: SkipConfig,
    summary: SummaryLayer | None,
    hidden_size: int,
    views: torch.Tensor | None,
) -> list[Reduced]:
    """Reduce images as rows of a batch that has nothing but these images."""
    whole = features[0][None] if len(features) == 1 else pad_sequence(features, batch_first=True)
    sizes = [len(image) for image in features]
    lengths = torch.tensor(sizes, device=whole.device)
    valid = torch.arange(whole.shape[1], device=whole.device) < lengths[:, None]
    tokens = VisualTokens(whole[..., :hidden_size], valid, views)
    plan = make_plan(tokens, Images.locate(valid, sizes), valid, config)
    merged = merge_tokens(whole, plan)
    if config.summary_tokens and summary is not None:
        embeds = summary(merged[..., :hidden_size], plan)
        merged = torch.cat([embeds, merged[..., hidden_size:]], dim=2)
    kept = plan.attention_mask
    return [
        Reduced(merged[row, kept[row]], plan.position_source[row, kept[row]]) for row in range(len(sizes))
    ]
