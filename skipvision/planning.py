"""From visual embeddings to a `TokenPlan`: select, then merge, then lay out."""

from __future__ import annotations

import torch

from skipvision.anatomy.images import Images
from skipvision.config import SkipConfig
from skipvision.layout import lay_out
from skipvision.merge import assign
from skipvision.plan import TokenPlan
from skipvision.select import CRITERIA, VisualTokens, top


@torch.no_grad()
def make_plan(
    tokens: VisualTokens,
    images: Images,
    attention_mask: torch.Tensor,
    config: SkipConfig,
    scores: torch.Tensor | None = None,
) -> TokenPlan:
    """Decide the whole plan of a batch.

    Args:
        tokens: the images' visual tokens.
        images: where they stand.
        attention_mask: (B, T) True where the caller has a token.
        config: what is asked for.
        scores: (I, N) scores to select by, for criteria that need the model ("ffn_ratio", "views" …).
    """
    counts = torch.tensor([config.counts(size) for size in images.sizes], device=tokens.valid.device)
    retained_count, skipped_count = counts.unbind(1)
    if scores is None:
        scores = CRITERIA[config.select](tokens, retained_count, config.seed)
    retained = top(scores, tokens.valid, retained_count)
    target = assign(
        tokens.features,
        tokens.unit,
        tokens.redundancy,
        tokens.valid,
        retained,
        skipped_count,
        config.merge,
    )
    return lay_out(images, attention_mask, retained, target, config)
