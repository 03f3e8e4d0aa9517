"""Drafted tokens at the end of a prefill: assisted `generate` checks its first drafts in the same call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skipvision.anatomy.encoding import brings_images

DRAFTS = "skip_vision_drafts"
"""Keyword of a prefill that ends with D drafted tokens: (B, D), which of them are image placeholders."""


def note_drafts(call: dict[str, Any], image_token_id: int) -> dict[str, Any] | None:
    """Return a call's keyword arguments with the drafts that it ends with, or None if there are none.

    Drafts repeat words of the prompt, so they may be image placeholders, for which there is no image. The
    call gets another word for each, which `embed_drafts` replaces.
    """
    ids, kept = call.get("input_ids"), call.get("logits_to_keep")
    if not isinstance(kept, int) or kept < 2 or call.get("past_key_values") is None:
        return None
    if not isinstance(ids, torch.Tensor) or torch.is_grad_enabled() or not brings_images(call):
        return None
    prompt, drafted = ids[:, : 1 - kept], ids[:, 1 - kept :]
    placeholders = drafted == image_token_id
    others = drafted.masked_fill(placeholders, int(image_token_id == 0))
    return {**call, "input_ids": torch.cat([prompt, others], dim=1), DRAFTS: placeholders}


def embed_drafts(
    outer: nn.Module, embeds: torch.Tensor, drafts: torch.Tensor, image_token_id: int
) -> torch.Tensor:
    """Return the (B, T, hidden) embeddings of a prefill with drafted placeholders as the words they are.

    Decoding reads a placeholder that the model has generated in the same way.
    """
    model: Any = outer
    table = model.get_input_embeddings()
    # A placeholder outside the vocabulary is never generated, so the draft is wrong whatever it is read as.
    if not drafts.any() or image_token_id >= table.num_embeddings:
        return embeds
    word = table(torch.tensor(image_token_id, device=embeds.device)).to(embeds.dtype)
    length = embeds.shape[1] - drafts.shape[1]
    return torch.cat([embeds[:, :length], torch.where(drafts[..., None], word, embeds[:, length:])], dim=1)
