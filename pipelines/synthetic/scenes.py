"""Still images of two things, one next to or above the other: their captions, and edits of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import BytesIO
from random import Random
from typing import Literal

from PIL import Image

from pipelines.synthetic.shapes import (
    COLOURS,
    NUM_GROUNDS,
    RGB,
    SHAPES,
    Combinations,
    Point,
    Thing,
    a,
    all_pairs,
    grounds,
    paint,
)

Relation = Literal["above", "left of"]
RELATIONS: tuple[Relation, ...] = ("above", "left of")

# Where the two cells of a scene are across the image, and how far a thing may be from the middle of its cell.
NEAR, MIDDLE, FAR = 0.26, 0.5, 0.74
SIZES = (0.38, 0.44)
_STRAY_ALONG, _STRAY_ACROSS = 0.015, 0.1

_WORDINGS: dict[Relation, tuple[str, ...]] = {
    "above": (
        "{first} above {second}",
        "{second} below {first}",
        "there is {first} on top of {second}",
        "{first} at the top and {second} at the bottom",
    ),
    "left of": (
        "{first} to the left of {second}",
        "{second} to the right of {first}",
        "there is {first} on the left of {second}",
        "{first} on the left and {second} on the right",
    ),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """Two things that differ in shape and in color, on a ground of a third color.

    "Below" and "right of" describe the same scenes in reverse.
    """

    first: Thing
    second: Thing
    relation: Relation
    ground: str

    def wordings(self) -> list[str]:
        """Return all captions of the scene. Each describes it completely."""
        things = [wording.format(first=self.first, second=self.second) for wording in _WORDINGS[self.relation]]
        return [f"{wording} {on(self.ground)}" for wording in things]


def all_scenes() -> Combinations[Scene]:
    """Return every scene once: 8 * 7 * 8 * 7 pairs in 2 relations on 6 grounds."""
    return Combinations(_scene, all_pairs(), RELATIONS, range(NUM_GROUNDS))


def _scene(pair: tuple[Thing, Thing], relation: Relation, ground: int) -> Scene:
    return Scene(*pair, relation, grounds(*pair)[ground])


def neighbors(scene: Scene) -> list[Scene]:
    """Return every scene that differs in exactly one attribute: 5 + 5 + 5 colors, 6 + 6 shapes, the other relation."""
    found = [replace(scene, relation=relation) for relation in RELATIONS if relation != scene.relation]
    found += [replace(scene, ground=name) for name in grounds(scene.first, scene.second) if name != scene.ground]
    found += [replace(scene, first=other) for other in _others(scene.first, scene.second, scene.ground)]
    return found + [replace(scene, second=other) for other in _others(scene.second, scene.first, scene.ground)]


def _others(thing: Thing, kept: Thing, ground: str) -> list[Thing]:
    """Return what can replace `thing` next to `kept`: the same with another color, or with another shape."""
    colours = [replace(thing, colour=name) for name in COLOURS if name not in (thing.colour, kept.colour, ground)]
    return colours + [replace(thing, shape=name) for name in SHAPES if name not in (thing.shape, kept.shape)]


def edit_into(target: Scene, rng: Random) -> tuple[Scene, str]:
    """Return a scene and the instruction that turns it into `target` by one change: color, shape, or places."""
    if rng.randrange(3) == 0:
        wording = rng.choice(("swap the positions", "let the two objects trade places"))
        return replace(target, first=target.second, second=target.first), f"{wording}, {on(target.ground)}"
    changed, kept = rng.choice(((target.first, target.second), (target.second, target.first)))
    old, wording = rng.choice((_recolour, _replace))(changed, kept, rng)
    instruction = f"{wording}, {on(target.ground)}"
    if changed is target.first:
        return replace(target, first=old), instruction
    return replace(target, second=old), instruction


def _recolour(new: Thing, kept: Thing, rng: Random) -> tuple[Thing, str]:
    colour = rng.choice([name for name in COLOURS if name not in (new.colour, kept.colour)])
    wording = rng.choice(("make the {shape} {colour}", "change the colour of the {shape} to {colour}"))
    return replace(new, colour=colour), wording.format(shape=new.shape, colour=new.colour)


def _replace(new: Thing, kept: Thing, rng: Random) -> tuple[Thing, str]:
    shape = rng.choice([name for name in SHAPES if name not in (new.shape, kept.shape)])
    wording = rng.choice(("replace the {old} with {new}", "turn the {old} into {new}"))
    return replace(new, shape=shape), wording.format(old=shape, new=a(new.shape))


def draw_scene(scene: Scene, image_px: int, rng: Random, *, at_night: bool = False) -> Image.Image:
    """Draw an RGB image, `image_px` squared. Background, places and sizes vary a little. `at_night` it is dark."""
    image = Image.new("RGB", (image_px, image_px), night(rng) if at_night else shade(scene.ground, rng))
    paint(image, scene.first, stray(scene.relation, NEAR, rng), rng.uniform(*SIZES))
    paint(image, scene.second, stray(scene.relation, FAR, rng), rng.uniform(*SIZES))
    return image


def on(ground: str) -> str:
    """Return how captions name the ground."""
    return f"on {a(ground)} background"


def shade(ground: str, rng: Random) -> RGB:
    """Return a shade of the ground's color."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in COLOURS[ground])
    return (red, green, blue)


def night(rng: Random) -> RGB:
    """Return a dark background of any tint."""
    return (rng.randint(0, 70), rng.randint(0, 70), rng.randint(0, 70))


def stray(relation: Relation, along: float, rng: Random) -> Point:
    """Return the center of a thing, near its place `along` the direction of the relation."""
    along += rng.uniform(-_STRAY_ALONG, _STRAY_ALONG)
    across = MIDDLE + rng.uniform(-_STRAY_ACROSS, _STRAY_ACROSS)
    return (across, along) if relation == "above" else (along, across)


def encode_image(image: Image.Image, suffix: str, quality: int = 90) -> bytes:
    """Return a `.jpg` file (color at full resolution) or a `.png` file."""
    buffer = BytesIO()
    if suffix == ".png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
