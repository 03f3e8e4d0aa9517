"""The marks around an image's placeholders in a prompt, and the inputs that distinguish them from words."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Frame:
    """Tokens around an image's placeholders, by config field, or by any other name without one.

    Attributes:
        before: before the image.
        lead: before each segment.
        between: between two segments.
        after: after the image.
    """

    before: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.before + self.lead + self.between + self.after


_BETWEEN_ENDS = Frame(before=("start",), after=("end",))
_EACH_NAMED = Frame(lead=("fake", "place"), after=("fake",))

FRAMES: dict[str, Frame] = {
    "aya_vision": Frame(before=("start",), lead=("tile",), after=("end",)),
    "cohere2_vision": Frame(before=("start",), between=("break",), after=("break", "end")),
    "emu3": _BETWEEN_ENDS,
    "fuyu": Frame(between=("newline",), after=("newline", "beginning")),
    "granite_docling": _EACH_NAMED,
    "idefics3": _EACH_NAMED,
    "inkling_mm_model": Frame(before=("image_bos_token_id",)),
    "internvl": _BETWEEN_ENDS,
    "janus": _BETWEEN_ENDS,
    "lfm2_vl": _BETWEEN_ENDS,
    "llama4": Frame(before=("boi_token_index",), between=("separator",), after=("eoi_token_index",)),
    "minicpm_ocr": _BETWEEN_ENDS,
    "minicpmv4_6": _BETWEEN_ENDS,
    "minicpmv4_7": _BETWEEN_ENDS,
    "minimax_m3_vl": _BETWEEN_ENDS,
    "mistral3": Frame(between=("break",), after=("end",)),
    "mistral_large4": Frame(between=("break",), after=("end",)),
    "muse_glimmer": _BETWEEN_ENDS,
    "muse_spark": _BETWEEN_ENDS,
    "nemotron_h_omni": _BETWEEN_ENDS,
    "ovis2": Frame(
        before=("visual_indicator_token_ids.0",),
        between=("visual_indicator_token_ids.1",),
        after=("visual_indicator_token_ids.4",),
    ),
    "qianfan_ocr": _BETWEEN_ENDS,
    "smolvlm": _EACH_NAMED,
    "step3p7": _BETWEEN_ENDS,
}
"""Frames by model_type; `frame_of` has the rule for all other families."""

PAIRS = {
    "vision_start_token_id": "vision_end_token_id",
    "image_start_token_id": "image_end_token_id",
    "boi_token_index": "eoi_token_index",
    "boi_token_id": "eoi_token_id",
}
"""Config fields of the tokens that begin and end an image."""


def frame_of(config: PretrainedConfig) -> Frame:
    """Return the family's frame. By default, tokens that begin and end an image by its config frame it."""
    pairs = (Frame(before=(start,), after=(end,)) for start, end in PAIRS.items() if hasattr(config, start))
    return FRAMES.get(config.model_type) or next(pairs, Frame())


TOKEN_TYPES = {
    "token_type_ids": ("image_token_id",),
    "mm_token_type_ids": ("image_token_id",),
    "moe_mm_token_type_ids": ("image_start_token_id", "image_token_id", "image_end_token_id"),
}
"""Inputs that are 1 at the tokens of these config fields, and 0 elsewhere."""

ONE_TOKEN_TYPE = {"paligemma"}
"""Families whose token types are 0 in the prompt and 1 in the answer instead."""
