"""The combinations of family, attention implementation and dtype, their inputs, and the limits of families.

Every test of the matrix takes one combination. `make test` samples the matrix: each test runs for each family
in one combination. The combination rotates from family to family and, by ``turn``, from test to test, so that
each family meets all of them. The most used families also run in the opposite combination. Tests that extend
another test of the matrix run for half of the other families (``halved``). `make test-all` runs the whole
matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from skipvision import SkipConfig
from skipvision.testing.families import tiny_model
from tests.skipvision.family_table import BEFORE_5_18
from tests.skipvision.family_table import SUPPORTED as FAMILIES

PRIORITY = {"gemma3", "internvl", "llama4", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm"}
COMBINATIONS = [(attention, dtype) for attention in ("sdpa", "eager") for dtype in ("float32", "bfloat16")]

ONLY_FLOAT32 = {
    "aria",
    "deepseek_ocr2",
    "ernie4_5_vl_moe",
    "glm4v_moe",
    "kimi_k25",
    "minimax_m3_vl",
    "muse_spark",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "step3p7",
}
"""Families whose experts' grouped product has no float64 on CPU."""
FLOAT32_INSIDE = {
    "dots3_note",
    "glm5_next",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "nemotron_h_omni",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
}
"""Families whose linear attention or indexer computes in float32, whatever the dtype of the model."""
ONLY_EAGER = {"got_ocr2", "pp_chart2table"}
"""Families whose towers have no SDPA."""
TOLERANCE = 1e-4
"""Maximum difference of hidden states, whose size is about 1, in float32."""
LOSSY_STATES = {"nemotron_h_omni"}
"""Families whose states lose digits in float32: ten times that difference after several turns."""

ROWS: list[list[int | str]] = [
    [3, "image", 24],
    [5],
    [2, "image", 2, "small image", 12, "large image", 3],
]
"""One image, none, three of different sizes; longer than the windows and chunks of tiny models (20)."""


class Limit(NamedTuple):
    """A limit of the families' own code: `test_limits` demonstrates it, docs/families.md lists it."""

    families: tuple[str, ...]
    reason: str
    rows: list[list[int | str]]
    """Rows that replace `ROWS` for these families; empty if nothing can be tested."""


_GRIDS = ("cohere_compass", "cosmos3", "ernie4_5_vl", "glm", "paddleocr", "qwen", "video_llama_3")
_BATCHED = ("idefics3", "smolvlm")
"""Families (beginnings of names) that repeat images correctly before 5.18: by grids, or by rows."""
_UNREPEATED = ("exaone4_5", "kimi_k25", "muse_glimmer")
"""Families that repeat the patches of images, not images, before 5.18."""
MIXED_UP = Limit(
    tuple(name for name in FAMILIES if not name.startswith(_GRIDS + _BATCHED + _UNREPEATED))
    if BEFORE_5_18
    else ("glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "granite4_vision"),
    "beam search mixes up the images of a row that has several",
    # Before 5.18 also the tiles of an image.
    [[3, "small image", 24], [5], [2, "small image", 3]]
    if BEFORE_5_18
    else [[3, "image", 24], [5], [2, "large image", 3]],
)
NOT_REPEATED = Limit(
    _UNREPEATED if BEFORE_5_18 else ("fuyu", "llama4"),
    "beam search repeats the prompts, but not the encoded images, and raises an error",
    [],
)
PADDED = Limit(
    ("emu3",),
    "an image's features depend on the largest image of the batch, to whose size it is padded",
    [[3, "image", 24], [5], [2, "image", 2, "image", 12, "image", 3]],
)
NUMBERED = Limit(
    ("hunyuan_vl",),
    "one axis of the positions numbers the images of the batch, so a row's depend on the rows above it",
    [ROWS[2], ROWS[1]],
)
ROUNDED = Limit(
    ("muse_spark",),
    "in bfloat16 a row's roundings depend on the length it is padded to, and its experts on them",
    [ROWS[2], ROWS[1]],
)
COUNTED = Limit(
    ("llama4",),
    "layers without rotations scale queries by the length of the cache, in steps of 8,192 tokens: a pruned "
    "cache is shorter, so the scale is smaller",
    ROWS,
)
LIMITS = (MIXED_UP, NOT_REPEATED, PADDED, NUMBERED, ROUNDED, COUNTED)


def rows_within(family: str, *limits: Limit) -> list[list[int | str]]:
    """Return the rows to test a family with, if it has one of these limits."""
    return next((limit.rows for limit in limits if family in limit.families), ROWS)


MERGING = SkipConfig(retained=0.4, skipped=0.3, select="norm", summary_tokens=2)
DROPPING = SkipConfig(retained=0.4, skipped=0.3, select="norm", merge="drop", summary_tokens=0)


BOTH = ("float32", "bfloat16")


def combinations(
    *,
    turn: int = 0,
    dtypes: Sequence[str] = BOTH,
    families: Sequence[str] = FAMILIES,
    halved: bool = False,
) -> Any:
    """Parametrise a test by family, attention and dtype; ``turn`` rotates the sampled combinations."""
    chosen = list(cases(turn, dtypes, families, halved=halved))
    return pytest.mark.parametrize(("family", "attention", "dtype"), chosen)


def cases(
    turn: int, dtypes: Sequence[str], families: Sequence[str], *, halved: bool = False
) -> Iterator[Any]:
    """Yield all combinations that each family supports; those beyond the sample are marked slow."""
    for number, family in enumerate(families):
        offered = [
            (attention, dtype)
            for attention, dtype in COMBINATIONS
            if dtype in dtypes and not (attention == "sdpa" and family in ONLY_EAGER)
        ]
        own = (number + turn) % len(offered)
        sampled = {own, len(offered) - 1 - own} if family in PRIORITY else {own}
        # Alternate by whole rounds of combinations, so that the half still has every combination.
        if halved and family not in PRIORITY and (number + turn) // len(COMBINATIONS) % 2:
            sampled = set()
        for place, (attention, dtype) in enumerate(offered):
            marks = [] if place in sampled else [pytest.mark.slow]
            yield pytest.param(family, attention, dtype, marks=marks, id=f"{family}-{attention}-{dtype}")


@functools.cache
def model_of(family: str, attention: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Return one model for all tests, which must leave it unchanged."""
    return tiny_model(family, dtype=getattr(torch, dtype), attention=attention)
