"""Videos: one thing moves, grows or shrinks, and another one stays."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Literal

import av
from av.container import Flags
from PIL import Image

from pipelines.synthetic.scenes import FAR, MIDDLE, NEAR, SIZES, Relation, on, shade, stray
from pipelines.synthetic.shapes import NUM_GROUNDS, Combinations, Point, Thing, all_pairs, grounds, paint

FRAMES_PER_S = 8

Place = Literal["above", "below", "to the left of", "to the right of"]


@dataclass(frozen=True, slots=True)
class Motion:
    """What the mover does: two wordings, its path across the image, its size at both ends."""

    wordings: tuple[str, str]
    path: tuple[float, float] = (MIDDLE, MIDDLE)
    scale: tuple[float, float] = (1.0, 1.0)


MOTIONS: dict[str, Motion] = {
    "right": Motion(("moving to the right", "sliding from left to right"), path=(NEAR, FAR)),
    "left": Motion(("moving to the left", "sliding from right to left"), path=(FAR, NEAR)),
    "up": Motion(("moving upwards", "rising"), path=(FAR, NEAR)),
    "down": Motion(("moving downwards", "falling"), path=(NEAR, FAR)),
    "grow": Motion(("growing", "getting bigger"), scale=(0.45, 1.0)),
    "shrink": Motion(("shrinking", "getting smaller"), scale=(1.0, 0.45)),
}

_ROWS: tuple[Place, ...] = ("above", "below")
_COLUMNS: tuple[Place, ...] = ("to the left of", "to the right of")
_OPPOSITE: dict[Place, Place] = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
# A thing that crosses the image needs its own row or column.
_PLACES: dict[str, tuple[Place, ...]] = {
    "right": _ROWS,
    "left": _ROWS,
    "up": _COLUMNS,
    "down": _COLUMNS,
    "grow": _ROWS + _COLUMNS,
    "shrink": _ROWS + _COLUMNS,
}


@dataclass(frozen=True, slots=True)
class Clip:
    """`mover` does `motion` at its `place` relative to `still`, for example above it."""

    mover: Thing
    still: Thing
    motion: str
    place: Place
    ground: str

    def wordings(self) -> list[str]:
        """Return all captions of the clip. Each describes it completely."""
        return [
            f"{wording} {on(self.ground)}"
            for does in MOTIONS[self.motion].wordings
            for wording in (
                f"{self.mover} {does} {self.place} {self.still}",
                f"{self.place} {self.still}, {self.mover} is {does}",
                f"{self.still} {_OPPOSITE[self.place]} {self.mover} that is {does}",
            )
        ]


def all_clips() -> Combinations[Clip]:
    """Return every clip once: 8 * 7 * 8 * 7 pairs in 16 combinations of motion and place on 6 grounds."""
    motions = [(motion, place) for motion, places in _PLACES.items() for place in places]
    return Combinations(_clip, all_pairs(), motions, range(NUM_GROUNDS))


def _clip(pair: tuple[Thing, Thing], motion: tuple[str, Place], ground: int) -> Clip:
    return Clip(*pair, *motion, grounds(*pair)[ground])


def draw_clip(clip: Clip, image_px: int, num_frames: int, rng: Random) -> list[Image.Image]:
    """Draw RGB frames, `image_px` squared. Background, places and sizes vary a little."""
    relation: Relation = "above" if clip.place in _ROWS else "left of"
    mover_at, still_at = (NEAR, FAR) if clip.place in ("above", "to the left of") else (FAR, NEAR)
    background = Image.new("RGB", (image_px, image_px), shade(clip.ground, rng))
    paint(background, clip.still, stray(relation, still_at, rng), rng.uniform(*SIZES))
    size, motion = rng.uniform(*SIZES), MOTIONS[clip.motion]
    frames = []
    for i in range(num_frames):
        progress = i / (num_frames - 1)
        across = _between(motion.path, progress)
        centre: Point = (across, mover_at) if relation == "above" else (mover_at, across)
        frame = background.copy()
        paint(frame, clip.mover, centre, size * _between(motion.scale, progress))
        frames.append(frame)
    return frames


def _between(ends: tuple[float, float], progress: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * progress


def encode_clip(frames: list[Image.Image]) -> bytes:
    """Return an H.264 MP4 file. Equal frames give equal bytes: one encoder thread, no time stamp, no version string."""
    buffer = BytesIO()
    # x264's macroblock tree reads memory that it has not written, which changes the bytes of about one file in fifty.
    options = {"preset": "veryfast", "crf": "18", "bf": "0", "mbtree": "0"}
    with av.open(buffer, "w", format="mp4") as container:
        container.flags |= Flags.bitexact.value
        stream = container.add_stream("libx264", rate=FRAMES_PER_S, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()
