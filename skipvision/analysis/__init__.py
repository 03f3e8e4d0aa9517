"""Measure and draw the effect of Skip-Vision on a model and its images.

`patches_of` turns a plan into an `Overlay`: which patches of an image are retained, skipped, merged, dropped.
`ffn_ratios` measures how much each layer's FFN changes visual and text tokens, and so why it can be skipped.
`error_bound` bounds and measures the error of skipping it (docs/analysis.md).

Reading order: `geometry`, `patches`, `overlay`, `painting`, `overlay_command`; then `ratios`; then `runs`,
`bound` and the bounds that it combines: `worst_case` (from `lipschitz` and `spectral`) and `local`.
"""

from skipvision.analysis.bound import ErrorBound, Errors, LayerErrors, OutputErrors, error_bound
from skipvision.analysis.overlay import Overlay, patches_of
from skipvision.analysis.patches import Patch
from skipvision.analysis.ratios import FfnRatios, Spread, ffn_ratios

__all__ = [
    "ErrorBound",
    "Errors",
    "FfnRatios",
    "LayerErrors",
    "OutputErrors",
    "Overlay",
    "Patch",
    "Spread",
    "error_bound",
    "ffn_ratios",
    "patches_of",
]
