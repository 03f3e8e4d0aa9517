"""Draw the patches of an overlay over its image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from PIL import Image, ImageDraw, ImageFont

from skipvision.analysis.geometry import Box, Size, View
from skipvision.analysis.patches import Fate, Patch

Colour = tuple[int, int, int]

_OUTLINE: dict[Fate, Colour] = {
    "retained": (255, 255, 255),
    "skipped": (255, 176, 0),
    "merged": (90, 90, 90),
    "dropped": (0, 0, 0),
}
_VEIL: dict[Fate, int] = {"retained": 0, "skipped": 0, "merged": 130, "dropped": 220}
"""Opacity of the colour over a patch, of 255."""
_EDGE: Colour = (0, 0, 0)
_LINE = 160
_GAP = 8
_LEGEND = 28


def paint(
    image: Image.Image,
    views: Sequence[View],
    patches: Sequence[Patch],
    counts: Mapping[Fate, int],
    side: int,
    drop_after: int | None = None,
) -> Image.Image:
    """Draw the image once for each panel of views, with its patches marked by fate.

    Merged patches have the colour of the patch that they are merged into, and a line to it. The legend names
    ``drop_after``.
    """
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    panels = _panels(views)
    canvas = Image.new("RGB", (len(panels) * (size[0] + _GAP) - _GAP, size[1] + _LEGEND), "white")
    panel_of = _panel_of_each_token(views, panels)
    hues = {into: _colour(number) for number, into in enumerate(sorted(_hosts(patches)))}
    boxes = [_scaled(patch.box, image.size, size) for patch in patches]
    for panel in range(len(panels)):
        canvas.paste(image.convert("RGB").resize(size), (panel * (size[0] + _GAP), 0))
    at = [_shifted(box, panel * (size[0] + _GAP)) for box, panel in zip(boxes, panel_of, strict=True)]
    _veil(canvas, patches, at, hues)
    _outline(ImageDraw.Draw(canvas), patches, at, hues)
    _legend(canvas, counts, size[1], drop_after)
    return canvas


def _panels(views: Sequence[View]) -> list[list[int]]:
    """Distribute the views over panels so that the views of a panel do not overlap; returns their indices."""
    panels: list[list[int]] = []
    for number, view in enumerate(views):
        free = (panel for panel in panels if not any(_overlap(view.box, views[n].box) for n in panel))
        panel = next(free, None)
        if panel is None:
            panels.append([number])
        else:
            panel.append(number)
    return panels


def _overlap(one: Box, other: Box) -> bool:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    # Adjacent tiles may overlap by a rounding error.
    return across > 1e-6 and down > 1e-6


def _panel_of_each_token(views: Sequence[View], panels: Sequence[Sequence[int]]) -> list[int]:
    panel_of = {number: index for index, panel in enumerate(panels) for number in panel}
    return [panel_of[number] for number, view in enumerate(views) for _ in range(view.tokens)]


def _hosts(patches: Sequence[Patch]) -> set[int]:
    return {patch.into for patch in patches if patch.into is not None}


def _colour(number: int) -> Colour:
    """Step the hue by the golden ratio, so that consecutive numbers get distinct colours."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.61803398875 % 1, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _scaled(box: Box | None, old: Size, new: Size) -> Box | None:
    if box is None:
        return None
    across, down = new[0] / old[0], new[1] / old[1]
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def _shifted(box: Box | None, by: float) -> Box | None:
    return None if box is None else (box[0] + by, box[1], box[2] + by, box[3])


def _veil(
    canvas: Image.Image,
    patches: Sequence[Patch],
    boxes: Sequence[Box | None],
    hues: Mapping[int, Colour],
) -> None:
    """Cover merged and dropped patches, and draw a line from each merged patch to its target."""
    veil = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(veil)
    for patch, box in zip(patches, boxes, strict=True):
        if box is not None and _VEIL[patch.fate]:
            colour = _OUTLINE[patch.fate] if patch.into is None else hues[patch.into]
            draw.rectangle(_pixels(box), fill=(*colour, _VEIL[patch.fate]))
    for patch, box in zip(patches, boxes, strict=True):
        end = None if patch.into is None else boxes[patch.into]
        if box is not None and end is not None and patch.into is not None:
            draw.line([_centre(box), _centre(end)], fill=(*hues[patch.into], _LINE), width=1)
    canvas.paste(veil, mask=veil)


def _outline(
    draw: ImageDraw.ImageDraw,
    patches: Sequence[Patch],
    boxes: Sequence[Box | None],
    hues: Mapping[int, Colour],
) -> None:
    """Outline retained and skipped patches, with an inner ring in the colour of patches merged into them."""
    for number, (patch, box) in enumerate(zip(patches, boxes, strict=True)):
        if box is None or patch.fate in ("merged", "dropped"):
            continue
        left, top, right, bottom = _pixels(box)
        rings: list[Colour] = [_EDGE, _OUTLINE[patch.fate], _OUTLINE[patch.fate]]
        rings += [hues[number]] * 2 if number in hues else []
        # Fewer rings on small patches, so that half of the patch stays visible.
        for ring, colour in enumerate(rings[: max(1, min(right - left, bottom - top) // 4)]):
            draw.rectangle((left + ring, top + ring, right - ring, bottom - ring), outline=colour)


def _legend(canvas: Image.Image, counts: Mapping[Fate, int], top: int, drop_after: int | None) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default()
    entries = [(fate, f"{fate} {count}") for fate, count in counts.items()]
    widths = [24 + draw.textlength(text, font=font) + 16 for _, text in entries]
    for (fate, text), (left, _) in zip(entries, pairwise(accumulate(widths, initial=6.0)), strict=True):
        draw.rectangle(
            (left, top + 8, left + 14, top + 20),
            outline="black",
            fill=_OUTLINE[fate],
        )
        draw.text((left + 20, top + 8), text, fill="black", font=font)
    if drop_after is not None:
        draw.text((6 + sum(widths), top + 8), f"none after layer {drop_after}", fill="black", font=font)


def _pixels(box: Box) -> tuple[int, int, int, int]:
    """Round to pixels, without the last row and column: they belong to the neighbour."""
    left, top, right, bottom = (round(edge) for edge in box)
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
