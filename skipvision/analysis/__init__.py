"""What Skip-Vision does to a model and its images, measured and drawn.

`patches_of` makes an `Overlay` of a plan: which patches of an image are retained, skipped, merged, dropped.
"""

from skipvision.analysis.overlay import Overlay, patches_of
from skipvision.analysis.patches import Patch

__all__ = ["Overlay", "Patch", "patches_of"]
