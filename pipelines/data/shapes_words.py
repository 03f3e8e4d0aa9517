"""The words of shapes data: of captions, and of answers to questions for colours, shapes and places."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "purple": (130, 50, 165),
    "orange": (240, 130, 25),
}
"""The RGB values in which objects are drawn, by name."""
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
"""The cells of a 3 × 3 grid in reading order."""
