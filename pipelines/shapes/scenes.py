"""Shapes: small synthetic scenes, with questions and answers, drawn on demand.

A scene has one to four objects (shape, colour, size) and one short number, each in its own cell of a
3 × 3 grid. Scene number ``index`` of a split is a pure function of ``(seed, split, index)``.

The three splits share no scene, whatever the seeds and counts: a hash of a scene's content decides its split
(`split_of`), and the sampler redraws until it gets a scene of the split it needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.data.shapes_words import COLOURS, PLACES, SHAPES

Split = Literal["train", "validation", "test"]
Task = Literal["caption", "colour", "shape", "count", "place", "number"]
T = TypeVar("T")
SPLITS: tuple[Split, ...] = get_args(Split)
TASKS: tuple[Task, ...] = get_args(Task)

IMAGE_SIZE = 224
"""Side of a rendered scene in pixels."""
FONT_SIZE = 28
"""Height of the number in pixels; its digits are at least one 14-pixel patch apart."""

SIZES = {"small": (12, 15), "large": (22, 27)}
"""Smallest and largest radius of an object in pixels."""
_CELL = IMAGE_SIZE / 3
_SUPERSAMPLE = 2


@dataclass(frozen=True)
class Thing:
    """One object of a scene: its look, its cell, and its centre and radius in pixels."""

    shape: str
    colour: str
    size: str
    cell: int
    centre: tuple[float, float]
    radius: float

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """The content of one image: objects in reading order, a number, and the background colour."""

    things: tuple[Thing, ...]
    number: str
    number_cell: int
    number_centre: tuple[float, float]
    background: tuple[int, int, int]

    @property
    def signature(self) -> str:
        """Return the scene's content as text, without the jitter of positions."""
        things = ";".join(f"{t.shape},{t.colour},{t.size},{t.cell}" for t in self.things)
        return f"{things}|{self.number},{self.number_cell}"


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its only right answer."""

    task: Task
    prompt: str
    answer: str


def split_of(scene: Scene) -> Split:
    """Return a scene's split by a hash of its signature: 80 % train, 10 % validation, 10 % test."""
    bucket = hashlib.sha256(scene.signature.encode()).digest()[0] % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def sample_scene(
    seed: int, split: Split, index: int, *, objects: tuple[int, int] = (1, 4)
) -> tuple[Scene, np.random.Generator]:
    """Return scene ``index`` of a split, with between ``objects[0]`` and ``objects[1]`` objects.

    Also return the random generator: the scene's questions are drawn from it next.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        scene = _draw_scene(rng, objects)
        if split_of(scene) == split:
            return scene, rng


def _draw_scene(rng: np.random.Generator, objects: tuple[int, int]) -> Scene:
    count = int(rng.integers(objects[0], objects[1] + 1))
    *cells, number_cell = (int(cell) for cell in rng.permutation(9)[: count + 1])
    things = tuple(_draw_thing(rng, cell) for cell in sorted(cells))
    number = str(rng.integers(10, 100) if rng.random() < 0.5 else rng.integers(100, 1000))
    background = int(rng.integers(215, 250))
    red, green, blue = (min(255, background + int(shift)) for shift in rng.integers(-6, 7, size=3))
    return Scene(
        things=things,
        number=number,
        number_cell=number_cell,
        number_centre=_jittered_centre(rng, number_cell, half_width=26, half_height=12),
        background=(red, green, blue),
    )


def _draw_thing(rng: np.random.Generator, cell: int) -> Thing:
    size = str(rng.choice(list(SIZES)))
    radius = float(rng.uniform(*SIZES[size]))
    return Thing(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        size=size,
        cell=cell,
        centre=_jittered_centre(rng, cell, half_width=radius, half_height=radius),
        radius=radius,
    )


def _jittered_centre(
    rng: np.random.Generator, cell: int, *, half_width: float, half_height: float
) -> tuple[float, float]:
    row, column = divmod(cell, 3)
    slack_x, slack_y = _CELL / 2 - half_width - 2, _CELL / 2 - half_height - 2
    return (
        (column + 0.5) * _CELL + float(rng.uniform(-slack_x, slack_x)),
        (row + 0.5) * _CELL + float(rng.uniform(-slack_y, slack_y)),
    )


# ---------------------------------------------------------------------------------------- drawing


def render(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB image of `IMAGE_SIZE` × `IMAGE_SIZE` pixels."""
    side = IMAGE_SIZE * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_shape(draw, thing)
    x, y = scene.number_centre
    draw.text(
        (x * _SUPERSAMPLE, y * _SUPERSAMPLE),
        scene.number,
        fill=(25, 25, 25),
        font=_font(FONT_SIZE * _SUPERSAMPLE),
        anchor="mm",
    )
    return image.reduce(_SUPERSAMPLE)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def digit_centres(scene: Scene) -> list[tuple[str, float, float]]:
    """Return each digit of the number with the pixel coordinates (x, y) of its centre."""
    font = _font(FONT_SIZE * _SUPERSAMPLE)
    x, y = scene.number_centre
    left = x - font.getlength(scene.number) / _SUPERSAMPLE / 2
    centres = []
    for position, digit in enumerate(scene.number):
        before = font.getlength(scene.number[:position]) / _SUPERSAMPLE
        width = font.getlength(digit) / _SUPERSAMPLE
        centres.append((digit, left + before + width / 2, y))
    return centres


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y = (coordinate * _SUPERSAMPLE for coordinate in thing.centre)
    r = thing.radius * _SUPERSAMPLE
    fill = COLOURS[thing.colour]
    match thing.shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            a = r * 0.85
            draw.rectangle((x - a, y - a, x + a, y + a), fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=fill)
        case "diamond":
            draw.polygon([(x, y - r), (x + r * 0.8, y), (x, y + r), (x - r * 0.8, y)], fill=fill)
        case "cross":
            a = r * 0.36
            draw.rectangle((x - r, y - a, x + r, y + a), fill=fill)
            draw.rectangle((x - a, y - r, x + a, y + r), fill=fill)
        case "star":
            points = []
            for corner in range(10):
                reach = r if corner % 2 == 0 else r * 0.42
                angle = math.pi * (corner / 5 - 0.5)
                points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
            draw.polygon(points, fill=fill)
        case unknown:
            raise ValueError(f"shape {unknown!r} cannot be drawn; known: {', '.join(SHAPES)}")


# -------------------------------------------------------------------------------------- questions


def caption(scene: Scene) -> str:
    """Describe everything in the scene in reading order, including the number."""
    parts = [(t.cell, f"a {t.size} {t.colour} {t.shape} at the {t.place}") for t in scene.things]
    parts.append((scene.number_cell, f"the number {scene.number} at the {PLACES[scene.number_cell]}"))
    phrases = [phrase for _, phrase in sorted(parts)]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}."


def question_for(scene: Scene, task: Task, rng: np.random.Generator) -> Question:
    """Draw a question of a task; every scene has a question of every task."""
    prompt, answer = _QUESTIONS[task](scene, rng)
    return Question(task, prompt, answer)


def _caption_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return _one_of(rng, ["Describe the image.", "What is in the picture?"]), caption(scene)


def _colour_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _one_of(rng, scene.things)
    prompts = [f"What colour is the shape at the {thing.place}?"]
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        prompts.append(f"What colour is the {thing.shape}?")
    return _one_of(rng, prompts), thing.colour


def _shape_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _one_of(rng, scene.things)
    prompts = [f"What shape is at the {thing.place}?"]
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        prompts.append(f"What shape is {thing.colour}?")
    return _one_of(rng, prompts), thing.shape


def _count_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.integers(3)
    if kind == 0:
        return "How many shapes are there?", str(len(scene.things))
    # Mostly an object of the scene: otherwise zero would be the safe answer.
    present = _one_of(rng, scene.things) if rng.random() < 0.7 else None
    if kind == 1:
        shape = present.shape if present else _one_of(rng, SHAPES)
        return f"How many {_plural(shape)} are there?", str(sum(t.shape == shape for t in scene.things))
    colour = present.colour if present else _one_of(rng, tuple(COLOURS))
    return f"How many {colour} shapes are there?", str(sum(t.colour == colour for t in scene.things))


def _place_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kinds = [(t.colour, t.shape) for t in scene.things]
    unique = [t for t in scene.things if kinds.count((t.colour, t.shape)) == 1]
    if not unique or rng.random() < 0.2:
        return "Where is the number?", PLACES[scene.number_cell]
    thing = _one_of(rng, unique)
    return f"Where is the {thing.colour} {thing.shape}?", thing.place


def _number_question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return _one_of(rng, ["What number is written?", "Read the number."]), scene.number


_QUESTIONS = {
    "caption": _caption_question,
    "colour": _colour_question,
    "shape": _shape_question,
    "count": _count_question,
    "place": _place_question,
    "number": _number_question,
}


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]
