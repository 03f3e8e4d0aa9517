"""From visual embeddings to a `TokenPlan`: select, then merge, then lay out."""

from __future__ import annotations

import torch

from skipvision.anatomy.images import Images
from skipvision.config import SkipConfig
from skipvision.errors import ConfigError
from skipvision.layout import lay_out
from skipvision.merge import Merge, assign
from skipvision.plan import TokenPlan
from skipvision.registry import is_built_in
from skipvision.select import Criterion, top
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

    Raises:
        ConfigError: a criterion or merge of another package returned scores or ends that no plan can use.
    """
    counts = torch.tensor([config.counts(size) for size in images.sizes], device=tokens.valid.device)
    retained_count, skipped_count, _ = counts.unbind(1)
    criterion, merge = config.criterion, config.merging
    with torch.autocast(tokens.features.device.type, enabled=False):
        scores = criterion.score(tokens, retained_count, config.seed)
        if not is_built_in(criterion):
            _check_scores(criterion, scores, tokens.valid)
        retained = top(scores, tokens.valid, retained_count)
        ends = merge.ends(tokens, retained, skipped_count)
        if not is_built_in(merge):
            _check_ends(merge, ends, tokens.valid, retained, skipped_count)
    return lay_out(images, attention_mask, retained, assign(tokens, retained, ends), config)


def checked_reading(criterion: Criterion, reading: object, real: torch.Tensor) -> torch.Tensor:
    """Return what a criterion's probe has read. Raise `ConfigError` unless it has a number for each token.

    Args:
        criterion: of this package or another; its probe may come from another package.
        reading: the result of its probe.
        real: (B, T) the tokens of the early run.
    """
    method, expected = f"the probe of criterion {criterion.name!r}", "a number for every token"
    return _checked_tensor(reading, real, method, expected, floating=True, shape="(rows, tokens)")


def _check_scores(criterion: Criterion, scores: object, valid: torch.Tensor) -> None:
    """Raise `ConfigError` unless scores are (I, N) floating-point numbers, finite at every real token."""
    method, expected = f"criterion {criterion.name!r}", "finite scores of every token"
    scores = _checked_tensor(scores, valid, method, expected, floating=True)
    wrong = valid & ~scores.isfinite()
    if bool(wrong.any()):
        image, token = wrong.nonzero()[0].tolist()
        raise _fault(
            method,
            f"{float(scores[image, token])} for token {token} of image {image}, and is not finite at "
            f"{int(wrong.sum())} of {int(valid.sum())} tokens",
            expected,
        )


def _check_ends(
    merge: Merge, ends: object, valid: torch.Tensor, retained: torch.Tensor, skipped: torch.Tensor
) -> None:
    """Raise `ConfigError` unless every token ends in a survivor or is dropped.

    Exactly ``skipped[i]`` of the survivors of image i must not be retained.
    """
    method = f"merge {merge.name!r}"
    expected = "the index of a token of the same image, or -1"
    ends = _checked_tensor(ends, valid, method, expected, floating=False).long()
    rest, length = valid & ~retained, valid.shape[1]
    inside = (ends >= 0) & (ends < length)
    end = ends.clamp(0, max(length - 1, 0))
    inside &= torch.take_along_dim(valid, end, dim=1)
    wrong = rest & ~inside & (ends != -1)
    _refuse_first(wrong, ends, method, expected)
    itself = torch.arange(length, device=valid.device).expand_as(ends)
    survives = retained | (rest & (ends == itself))
    wrong = rest & inside & ~torch.take_along_dim(survives, end, dim=1)
    _refuse_first(wrong, ends, method, "a token that ends in itself or is retained")
    found = (survives & rest).sum(dim=1)
    if bool((found != skipped).any()):
        image = int((found != skipped).nonzero()[0])
        raise _fault(
            method,
            f"{int(found[image])} tokens of image {image} that end in themselves",
            f"exactly {int(skipped[image])} of the tokens that are not retained",
        )


def _checked_tensor(
    value: object,
    valid: torch.Tensor,
    method: str,
    expected: str,
    *,
    floating: bool,
    shape: str = "(images, tokens)",
) -> torch.Tensor:
    kind = "a floating-point" if floating else "an integer"
    if isinstance(value, torch.Tensor):
        integer = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        fits = value.is_floating_point() if floating else integer
        if fits and value.shape == valid.shape and value.device == valid.device:
            return value
        returned = f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    else:
        returned = f"{type(value).__name__} instead of a tensor"
    wanted = f"{tuple(valid.shape)} on {valid.device}"
    raise _fault(method, returned, f"{expected}: {kind} tensor of shape {shape} = {wanted}")


def _refuse_first(wrong: torch.Tensor, ends: torch.Tensor, method: str, expected: str) -> None:
    if bool(wrong.any()):
        image, token = wrong.nonzero()[0].tolist()
        raise _fault(
            method, f"{int(ends[image, token])} as the end of token {token} of image {image}", expected
        )


def _fault(method: str, returned: str, expected: str) -> ConfigError:
    return ConfigError(f"{method} returned {returned}; expected {expected}: correct its function")
