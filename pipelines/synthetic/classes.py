"""Classification: equal things in an image, and three questions about them: which shape, which color, how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

from PIL import Image

from pipelines.synthetic.shapes import COLOURS, RGB, SHAPES, Thing, paint

NUMBERS = ("one object", "two objects", "three objects", "four objects")
# Fractions of the image's width: centers of the four cells, how far a thing may be from its center, and its size.
_CELLS = tuple(product((0.27, 0.73), repeat=2))
_STRAY = 0.05
_SIZES = (0.28, 0.34)


@dataclass(frozen=True, slots=True)
class Group:
    """The same thing, `count` times."""

    thing: Thing
    count: int


@dataclass(frozen=True, slots=True)
class Question:
    """The instruction of a classification source, and the function that names the class of a group."""

    instruction: str
    answer: Callable[[Group], str]


QUESTIONS: dict[str, Question] = {
    "shapes": Question("Identify the shape of the objects in the image:", lambda group: group.thing.shape),
    "colours": Question("Identify the colour of the objects in the image:", lambda group: group.thing.colour),
    "numbers": Question("Count the objects in the image:", lambda group: NUMBERS[group.count - 1]),
}
"""Source -> its question."""


def all_groups() -> Iterator[Group]:
    """Yield every group once: 8 shapes in 8 colors, one to four of them."""
    for shape, colour, number in product(SHAPES, COLOURS, range(len(NUMBERS))):
        yield Group(Thing(shape, colour), number + 1)


def draw_group(group: Group, image_px: int, rng: Random) -> Image.Image:
    """Draw an RGB image, `image_px` squared. The filled cells, the background, places and sizes vary."""
    image = Image.new("RGB", (image_px, image_px), paper(rng))
    for x, y in rng.sample(_CELLS, group.count):
        centre = (x + rng.uniform(-_STRAY, _STRAY), y + rng.uniform(-_STRAY, _STRAY))
        paint(image, group.thing, centre, rng.uniform(*_SIZES))
    return image


def paper(rng: Random) -> RGB:
    """Return a light background: gray with a faint tint."""
    lightness = rng.randint(226, 250)
    return (lightness - rng.randint(0, 8), lightness - rng.randint(0, 8), lightness - rng.randint(0, 8))
