"""Find out which image-text-to-text families of the installed transformers are supported, by trying each.

A family is supported if a tiny random model of it returns the same logits, bit for bit, when nothing is
skipped; runs a ragged batch that a plan reduces; and generates from a cache of the planned length.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, __version__

from skipvision.anatomy.encoding import encoded_sizes
from skipvision.anatomy.families import FAMILIES as DECLARED
from skipvision.anatomy.families import Anatomy, Family, dissect
from skipvision.anatomy.masks import Sight
from skipvision.attach import attach
from skipvision.config import SkipConfig
from skipvision.errors import SkipVisionError, UnsupportedModelError
from skipvision.plan import TokenPlan, TokenRole
from skipvision.testing.families import FAMILIES, UNSUPPORTED, tiny_batch, tiny_model

EVERY = tuple(sorted({*FAMILIES, *UNSUPPORTED}))
"""Every image-text-to-text model_type of the installed transformers."""

_ROWS: list[list[int | str]] = [[3, "image", 4], [5], ["image", 2, "image", 3, "small image", 2]]
_CONFIG = SkipConfig(retained=0.4, skipped=0.3, select="norm")
_NEW = 4


@dataclass(frozen=True)
class Finding:
    """Support and traits of one family. The traits are only set if it is supported.

    Attributes:
        family: its model_type.
        reason: why it is not supported, in a few words; None if it is.
        images: "one size" or "several sizes", counted in visual tokens; "tiles", if each tile counts as an
            image; or "tiles, joined", if the tiles of an image count as one.
        views: position of the view of the whole image among the high-resolution crops: "first" or "last";
            None with a single view.
        mrope: whether positions have three axes.
        deepstack: whether early layers add further visual features.
        attention: how the decoder's layers mix tokens, one word for each kind that it has: transformers' name
            of the kind without "_attention", such as "full", "sliding", "linear" or "conv".
        experts: whether some FFNs are mixtures of experts.
    """

    family: str
    reason: str | None = None
    images: str = ""
    views: str | None = None
    mrope: bool = False
    deepstack: bool = False
    attention: tuple[str, ...] = ()
    experts: bool = False

    @property
    def supported(self) -> bool:
        """Whether the family passed every check of the survey."""
        return self.reason is None

    @property
    def traits(self) -> dict[str, str]:
        """Traits of a supported family by table heading; empty text for an absent trait."""
        return {
            "images": self.images,
            "views": f"whole image {self.views}" if self.views else "",
            "positions": "M-RoPE" if self.mrope else "",
            "visual features": "DeepStack" if self.deepstack else "",
            "attention": ", ".join(self.attention),
            "FFN": "experts" if self.experts else "",
        }


def survey(family: str) -> Finding:
    """Try one family. A failure is returned as the reason, not raised."""
    try:
        with warnings.catch_warnings():
            # Other libraries warn about random weights and tiny sizes.
            warnings.simplefilter("ignore")
            return _try(family)
    except UnsupportedModelError as error:
        return Finding(family, error.reason)
    except SkipVisionError as error:
        return Finding(family, str(error))
    except Exception as error:  # must not end the survey of the other families
        return Finding(family, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line for each family."""
    width = max((len(finding.family) for finding in findings), default=0)
    return [f"{finding.family:{width}}  {_verdict(finding)}" for finding in findings]


def _verdict(finding: Finding) -> str:
    traits = ", ".join(trait for trait in finding.traits.values() if trait)
    return f"supported: {traits}" if finding.supported else f"not supported: {finding.reason}"


def markdown(findings: Sequence[Finding]) -> str:
    """Return the tables of supported and other families as Markdown."""
    columns = Finding("").traits
    supported = [_row(f.family, *f.traits.values()) for f in findings if f.supported]
    others = [_row(f.family, str(f.reason)) for f in findings if not f.supported]
    if supported:
        supported = ["", _row("supported", *columns), _row("---", *("---" for _ in columns)), *supported]
    if others:
        others = ["", _row("not supported", "why"), _row("---", "---"), *others]
    return "\n".join([f"{count(findings)}.", *supported, *others]) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def count(findings: Sequence[Finding]) -> str:
    """Describe how many families are supported."""
    supported = sum(finding.supported for finding in findings)
    of = f"{len(findings)} image-text-to-text families of transformers {__version__}"
    return f"{supported} of {of} are supported"


def _try(family: str) -> Finding:
    declared = DECLARED.get(family, Family()).refused
    if declared is not None:  # whether or not it can be built here
        return Finding(family, declared)
    model = tiny_model(family)
    anatomy = dissect(model)
    batch = tiny_batch(model, _ROWS)
    call = _identity(model, anatomy, batch)
    _reduction(model, batch)
    positions = call.get("position_ids")
    ffns = [layer.mlp for layer in anatomy.layers if layer.mlp is not None]
    return Finding(
        family,
        images=_images(model, anatomy),
        views=anatomy.family.base_view,
        mrope=positions is not None and positions.ndim == 3,
        deepstack=any("deepstack" in name and value is not None for name, value in call.items()),
        attention=tuple(kind.removesuffix("_attention") for kind in Sight.of(anatomy.decoder).kinds),
        experts=any(weight.ndim == 3 for mlp in ffns for weight in mlp.parameters()),
    )


@torch.no_grad()
def _identity(model: PreTrainedModel, anatomy: Anatomy, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Check that logits with nothing skipped equal the untouched model's; return the decoder's arguments."""
    seen: dict[str, Any] = {}

    def see(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = anatomy.decoder.register_forward_pre_hook(see, with_kwargs=True)
    untouched = model(**batch).logits
    handle.remove()
    with attach(model, SkipConfig.full()) as skip:
        attached = model(**batch).logits
    _check(skip.plan is not None and skip.plan.is_identity, "its images are not found")
    _check(torch.equal(attached, untouched), "its logits change although nothing is skipped")
    return seen


@torch.no_grad()
def _reduction(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Check a reduced forward pass, and generation from a pruned cache."""
    generate: Any = model.generate
    with attach(model, _CONFIG) as skip:
        logits = model(**batch).logits
        _check(_applied(skip.plan), "no plan is applied to its images")
        _check(
            bool(logits[batch["attention_mask"].bool()].isfinite().all()), "its reduced logits are not finite"
        )
        answer = generate(
            **batch, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, return_dict_in_generate=True
        )
        _check(_applied(skip.plan), "it generates without a plan")
        prompt = 0 if skip.plan is None else int(skip.plan.cache_mask.sum(dim=1).max())
        planned, cached = prompt + _NEW - 1, answer.past_key_values.get_seq_length()
        _check(cached == planned, f"its cache has {cached} entries, not the {planned} that were planned")


def _applied(plan: TokenPlan | None) -> bool:
    return plan is not None and bool((plan.roles == TokenRole.SKIPPED).any())


@torch.no_grad()
def _images(model: PreTrainedModel, anatomy: Anatomy) -> str:
    """Classify the sizes of images, as in `Finding.images`."""
    batches = [tiny_batch(model, [[size]]) for size in ("small image", "image", "large image")]
    entries = [encoded_sizes(anatomy.outer, batch) for batch in batches]
    if any(len(sizes) > 1 for sizes in entries):
        return "tiles, joined" if anatomy.family.tiles else "tiles"
    return "one size" if len({sum(sizes) for sizes in entries}) == 1 else "several sizes"


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedModelError(f"Skip-Vision does not work with this model: {reason}", reason)
