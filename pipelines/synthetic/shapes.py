"""Eight shapes in eight colors: the things in scenes and clips, and all combinations of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import TypeVar, overload

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]
Polygon = tuple[Point, ...]

COLOURS: dict[str, RGB] = {
    "red": (214, 36, 40),
    "orange": (250, 128, 10),
    "yellow": (250, 210, 30),
    "green": (40, 150, 70),
    "cyan": (50, 195, 215),
    "blue": (35, 80, 205),
    "purple": (125, 50, 170),
    "pink": (245, 135, 190),
}

NUM_GROUNDS = len(COLOURS) - 2

_SUPERSAMPLING = 4
_T = TypeVar("_T")


def _regular(radii: tuple[float, ...], points: int, centre: Point = (0.0, 0.0)) -> Polygon:
    """Return a closed polygon with corners at the given radii in turn, the first one at the top."""
    angles = (2 * math.pi * i / points for i in range(points))
    corners = ((radii[i % len(radii)], angle) for i, angle in enumerate(angles))
    return tuple((centre[0] + r * math.sin(a), centre[1] - r * math.cos(a)) for r, a in corners)


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _heart(points: int = 60) -> Polygon:
    angles = [2 * math.pi * i / points for i in range(points)]
    xs = [math.sin(a) ** 3 for a in angles]
    ys = [(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 for a in angles]
    return tuple((x, -y - 0.1) for x, y in zip(xs, ys, strict=True))


# Each shape consists of polygons in the square [-1, 1] x [-1, 1], y downwards. The second one of a ring is a hole.
SHAPES: dict[str, tuple[Polygon, ...]] = {
    "circle": (_regular((0.97,), 64),),
    "square": (_box(-0.9, -0.9, 0.9, 0.9),),
    "triangle": (((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),),
    "star": (_regular((1.05, 0.45), 10, centre=(0.0, 0.08)),),
    "cross": (_box(-0.36, -0.97, 0.36, 0.97), _box(-0.97, -0.36, -0.36, 0.36), _box(0.36, -0.36, 0.97, 0.36)),
    "ring": (_regular((0.99,), 64), _regular((0.52,), 64)),
    "heart": (_heart(),),
    "bar chart": (_box(-0.95, -0.1, -0.4, 0.95), _box(-0.27, -0.95, 0.27, 0.95), _box(0.4, -0.5, 0.95, 0.95)),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str

    def __str__(self) -> str:
        return a(f"{self.colour} {self.shape}")


def a(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


class Combinations(Sequence[_T]):
    """Every combination of one value of each axis, made by `make(*values)` when it is asked for."""

    def __init__(self, make: Callable[..., _T], *axes: Sequence[object]) -> None:
        self._make = make
        self._axes = axes

    def __len__(self) -> int:
        return math.prod(map(len, self._axes))

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        values = []
        for axis in reversed(self._axes):
            numbers, place = divmod(numbers, len(axis))
            values.append(axis[place])
        return self._make(*reversed(values))


def all_pairs() -> Combinations[tuple[Thing, Thing]]:
    """Return every ordered pair of things that differ in shape and in color: 8 * 7 * 8 * 7."""
    return Combinations(_pair, [*permutations(SHAPES, 2)], [*permutations(COLOURS, 2)])


def _pair(shapes: tuple[str, str], colours: tuple[str, str]) -> tuple[Thing, Thing]:
    return Thing(shapes[0], colours[0]), Thing(shapes[1], colours[1])


def grounds(first: Thing, second: Thing) -> list[str]:
    """Return the six colors of neither thing."""
    return [colour for colour in COLOURS if colour not in (first.colour, second.colour)]


def paint(image: Image.Image, thing: Thing, centre: Point, size: float) -> None:
    """Draw the thing into an RGB image in place. `centre` and `size` are fractions of the image's width."""
    mask = _mask(thing.shape, round(size * image.width))
    corner = tuple(round(c * image.width - mask.width / 2) for c in centre)
    image.paste(COLOURS[thing.colour], (corner[0], corner[1]), mask)


@lru_cache(maxsize=1024)
def _mask(shape: str, size_px: int) -> Image.Image:
    """Return the coverage of the shape, 8 bit, `size_px` squared, with smooth edges."""
    side = size_px * _SUPERSAMPLING
    coverage = Image.new("L", (side, side))
    draw = ImageDraw.Draw(coverage)
    for i, polygon in enumerate(SHAPES[shape]):
        corners = [((x + 1) / 2 * (side - 1), (y + 1) / 2 * (side - 1)) for x, y in polygon]
        draw.polygon(corners, fill=0 if shape == "ring" and i == 1 else 255)
    return coverage.reduce(_SUPERSAMPLING)
