"""From visual embeddings to a `TokenPlan`: select, then merge, then lay out."""

from __future__ import annotations

import torch

from skipvision.anatomy.images import Images
from skipvision.config import SkipConfig
from skipvision.layout import lay_out
from skipvision.merge import assign
from skipvision.plan import TokenPlan
from skipvision.select import top
from skipvision.tokens import VisualTokens


@torch.no_grad()
def make_plan(
    tokens: VisualTokens, images: Images, attention_mask: torch.Tensor, config: SkipConfig
) -> TokenPlan:
    """Make the plan of a batch, in the precision of its features also under autocast.

    Similarities in bfloat16 would choose other tokens than the engine does, which runs without autocast.

    Args:
        tokens: the images' visual tokens, with the reading that the criterion needs.
        images: their positions in the batch.
        attention_mask: (B, T) True where the caller has a token.
        config: criterion, merge, counts and layout.
    """
    counts = torch.tensor([config.counts(size) for size in images.sizes], device=tokens.valid.device)
    retained_count, skipped_count, _ = counts.unbind(1)
    with torch.autocast(tokens.features.device.type, enabled=False):
        scores = config.criterion.score(tokens, retained_count, config.seed)
        retained = top(scores, tokens.valid, retained_count)
        target = assign(tokens, retained, skipped_count, config.merging)
    return lay_out(images, attention_mask, retained, target, config)
