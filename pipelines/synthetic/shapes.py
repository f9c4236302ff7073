"""Eight shapes in eight colors: the things in scenes and clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

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

_SUPERSAMPLING = 4


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


def all_pairs() -> Iterator[tuple[Thing, Thing]]:
    """Yield every ordered pair of things that differ in shape and in color: 8 * 7 * 8 * 7."""
    for shapes in permutations(SHAPES, 2):
        for colours in permutations(COLOURS, 2):
            yield Thing(shapes[0], colours[0]), Thing(shapes[1], colours[1])


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
