"""Encode decoded inputs as token ids and uint8 patches, equal to transformers' processor, without importing it.

Workers that decode media import this module, so that it must be quick to import: no torch, no transformers. Pixels stay
uint8; the model normalizes them on its device. Shapes: N tokens, B inputs, V visuals, F frames of patches, C channels,
p edge of a patch in pixels.

A patch of the library has two frames. Those of a still picture are equal, so that only one travels to the model, which
repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from pipelines.config import PositiveInt
from pipelines.errors import BadMedia, UserError
from pipelines.samples import DecodedInput, UInt8Array, Visual
from pipelines.stored_json import read_json, stored_file
from rzen.config import PromptConfig
from rzen.families import Family, read_family
from rzen.inputs.prompts import TEMPLATES, Piece, Span, VisionKind, input_pieces

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
GRID_KINDS: dict[VisionKind, int] = {"image": 1, "video": 2}
MAX_ASPECT_RATIO = 200
UNKNOWN_FPS = 24
"""Frame rate of videos that do not say when their frames are shown, as in transformers' processors."""


@dataclass(frozen=True)
class EncodedBatch:
    """Inputs ready for the model: sequences end to end without padding, visuals in the order of their tokens."""

    input_ids: Int32Array
    """[N], the sequences of all inputs one after the other."""
    instruction: BoolArray
    """[N], whether the token is part of an input's instruction."""
    lengths: Int32Array
    """[B], tokens of each input."""
    visual_counts: Int32Array
    """[B], visuals of each input."""
    patches: UInt8Array
    """[F, C * p * p], the frames of each patch one after the other. Patches of a visual are in the library's order
    (t, h/m, w/m, m, m)."""
    patch_frames: UInt8Array
    """[V], frames of each patch of a visual: 1 for a single frame, else those of the checkpoint."""
    grids: Int32Array
    """[V, 3], patches of each visual along time, height and width."""
    grid_kinds: UInt8Array
    """[V], 1 image or page, 2 video."""
    grid_seconds: Float32Array
    """[V], seconds from one temporal patch of a video to the next, for families whose positions count them."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def concat(cls, batches: Sequence[EncodedBatch]) -> EncodedBatch:
        """Return all inputs in order. At least one batch is needed."""
        return cls(
            **{field.name: np.concatenate([getattr(batch, field.name) for batch in batches]) for field in fields(cls)}
        )

    def slice(self, start: int, stop: int) -> EncodedBatch:
        """Return inputs [start, stop) as views. Bounds are treated like those of a list."""
        inputs = slice(*slice(start, stop).indices(len(self)))
        tokens = _span(self.lengths, inputs)
        visuals = _span(self.visual_counts, inputs)
        patches = _span(self.grids.prod(axis=1) * self.patch_frames, visuals)
        return EncodedBatch(
            self.input_ids[tokens],
            self.instruction[tokens],
            self.lengths[inputs],
            self.visual_counts[inputs],
            self.patches[patches],
            self.patch_frames[visuals],
            self.grids[visuals],
            self.grid_kinds[visuals],
            self.grid_seconds[visuals],
        )

    def split(self) -> list[EncodedBatch]:
        """Return each input as a batch of its own, as views."""
        return [self.slice(index, index + 1) for index in range(len(self))]

    def without_patches(self) -> EncodedBatch:
        """Return the same tokens, whose visuals have no patches: the model gets those another way."""
        return replace(self, patches=self.patches[:0], patch_frames=np.zeros_like(self.patch_frames))

    def visuals(self) -> list[EncodedBatch]:
        """Return each visual as an input without tokens, as views."""
        num_visuals = len(self.grids)
        bare = replace(
            self,
            input_ids=self.input_ids[:0],
            instruction=self.instruction[:0],
            lengths=np.zeros(num_visuals, np.int32),
            visual_counts=np.ones(num_visuals, np.int32),
        )
        return bare.split()


def _span(counts: npt.NDArray[Any], groups: slice) -> slice:
    """Return the range of the elements of `groups` when group i holds counts[i] elements."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    return slice(int(ends[groups.start]), int(ends[max(groups.start, groups.stop)]))


@stored_file
class _VisionFile(TypedDict):
    patch_size: PositiveInt
    temporal_patch_size: PositiveInt
    merge_size: PositiveInt
    image_mean: list[float]
    image_std: list[float]


@dataclass(frozen=True)
class VisionLayout:
    """How a checkpoint cuts pixels into patches and normalizes them (its `preprocessor_config.json`)."""

    patch_px: int
    temporal_patch_frames: int
    merge_patches: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @classmethod
    def read(cls, model_dir: str) -> VisionLayout:
        """Read the file of a checkpoint. Raises `UserError` where it is missing or lacks a setting."""
        path = Path(model_dir) / "preprocessor_config.json"
        if not path.is_file():
            raise UserError(str(path), "does not exist", "name the directory of a checkpoint")
        config = read_json(path, _VisionFile, "name a checkpoint of a Qwen-VL family")
        return cls(
            patch_px=config["patch_size"],
            temporal_patch_frames=config["temporal_patch_size"],
            merge_patches=config["merge_size"],
            image_mean=tuple(config["image_mean"]),
            image_std=tuple(config["image_std"]),
        )

    @property
    def factor_px(self) -> int:
        """Edge of the square that becomes one token."""
        return self.patch_px * self.merge_patches


def smart_resize(height_px: int, width_px: int, factor_px: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return (height, width) in multiples of the factor, about the same shape, within the pixel budget.

    This is transformers' rule: very long shapes may exceed `max_pixels`. Raises `BadMedia` beyond an aspect ratio of
    200.
    """
    sides_px = (height_px, width_px)
    if max(sides_px) / min(sides_px) > MAX_ASPECT_RATIO:
        raise BadMedia("extreme_aspect_ratio", f"{width_px} x {height_px} pixels")
    height, width = (round(input / factor_px) * factor_px for input in sides_px)
    if height * width > max_pixels:
        shrink = math.sqrt((height_px * width_px) / max_pixels)
        height, width = (max(factor_px, math.floor(input / shrink / factor_px) * factor_px) for input in sides_px)
    elif height * width < min_pixels:
        enlarge = math.sqrt(min_pixels / (height_px * width_px))
        height, width = (math.ceil(input * enlarge / factor_px) * factor_px for input in sides_px)
    return height, width


def resize(frames: UInt8Array, height_px: int, width_px: int) -> UInt8Array:
    """Return [T, H, W, 3] frames resized (bicubic)."""
    if frames.shape[1:3] == (height_px, width_px):
        return frames
    size = (width_px, height_px)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def patchify(frames: UInt8Array, layout: VisionLayout) -> tuple[UInt8Array, tuple[int, int, int]]:
    """Return patches [t * h * w * tp, C * p * p] of [T, H, W, C] frames, and the grid (t, h, w).

    The last frame is repeated to fill up the last group of `tp` frames. A single frame is not, and has tp = 1.
    """
    p, m, tp = layout.patch_px, layout.merge_patches, _frames_of_patch(len(frames), layout)
    missing = -len(frames) % tp
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]) if missing else frames
    t, h, w, channels = len(frames) // tp, frames.shape[1] // p, frames.shape[2] // p, frames.shape[3]
    blocks = frames.reshape(t, tp, h // m, m, p, w // m, m, p, channels).transpose(0, 2, 5, 3, 6, 1, 8, 4, 7)
    return blocks.reshape(t * h * w * tp, channels * p * p), (t, h, w)


def _frames_of_patch(num_frames: int, layout: VisionLayout) -> int:
    return 1 if num_frames == 1 else layout.temporal_patch_frames


def patch_times_s(times_s: Sequence[float], num_frames: int, frames_per_patch: int) -> list[float]:
    """Return when each temporal patch of a video is shown: the mean of its first and last frame (Qwen3-VL's processor).

    Frames without times follow each other at 24 frames per second.
    """
    times = list(times_s) or [frame / UNKNOWN_FPS for frame in range(num_frames)]
    times += times[-1:] * (-num_frames % frames_per_patch)
    return [(times[i] + times[i + frames_per_patch - 1]) / 2 for i in range(0, len(times), frames_per_patch)]


@dataclass(frozen=True)
class VisionInput:
    """A visual in the patches of a checkpoint."""

    kind: VisionKind
    patches: UInt8Array
    """[F, C * p * p], as in `EncodedBatch`."""
    grid: tuple[int, int, int]
    """Patches along time, height and width."""
    num_frames: int
    times_s: tuple[float, ...]
    """Times of the frames of a video, where they are known."""

    def seconds(self, frames_per_patch: int) -> float:
        """Return the time between temporal patches, at the mean rate of the frames. Images have no time."""
        if self.kind == "image":
            return 0.0
        span_s = self.times_s[-1] - self.times_s[0] if len(self.times_s) > 1 else 0.0
        return frames_per_patch * (span_s / (len(self.times_s) - 1) if span_s else 1 / UNKNOWN_FPS)


class Processor:
    """Encodes inputs for one checkpoint and prompt. Files are read at first use. Only their path is pickled."""

    def __init__(self, model_dir: str, prompt: PromptConfig) -> None:
        self.model_dir = model_dir
        self.prompt = prompt

    def __getstate__(self) -> dict[str, Any]:
        return {"model_dir": self.model_dir, "prompt": self.prompt}

    @cached_property
    def layout(self) -> VisionLayout:
        """Patch geometry and normalization of the checkpoint."""
        return VisionLayout.read(self.model_dir)

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that become tokens: `max_visual_tokens` squares of the checkpoint's own size."""
        return self.prompt.max_visual_tokens * self.layout.factor_px**2

    def encode(self, inputs: Sequence[DecodedInput]) -> EncodedBatch:
        """Return token ids and patches of one or more inputs.

        Raises `BadMedia` for a shape that the backbone cannot take.
        """
        return EncodedBatch.concat([self._encode_one(given) for given in inputs])

    def pieces(self, given: DecodedInput) -> list[Piece]:
        """Return the sequence of an input before it becomes token ids."""
        return self._pieces(given, self.vision_inputs(given.visuals))

    def num_text_tokens(self, given: DecodedInput) -> int:
        """Return how many tokens instruction and text have. An input keeps the first `prompt.max_text_tokens`."""
        pieces = input_pieces(self.prompt.template, given.instruction, given.text, [])
        return sum(len(self.text_ids(piece.text)) for piece in pieces if piece.kind in ("instruction", "text"))

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids. Raises `ValueError` for an id that the tokenizer does not have."""
        for token_id in token_ids:
            if not 0 <= token_id < 1 << 31 or self._tokenizer.id_to_token(token_id) is None:
                raise ValueError(f"{token_id} is not a token of the model")
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def _encode_one(self, given: DecodedInput) -> EncodedBatch:
        visuals = self.vision_inputs(given.visuals)
        return self.pack(*self._ids(self._pieces(given, visuals)), visuals)

    def pack(self, ids: Sequence[int], instruction: Sequence[bool], visuals: Sequence[VisionInput]) -> EncodedBatch:
        """Return one input: its token ids, which of them are the instruction's, and its visuals in their order."""
        tp = self.layout.temporal_patch_frames
        patch_values = 3 * self.layout.patch_px**2
        return EncodedBatch(
            input_ids=np.array(ids, np.int32),
            instruction=np.array(instruction, np.bool_),
            lengths=np.array([len(ids)], np.int32),
            visual_counts=np.array([len(visuals)], np.int32),
            patches=np.concatenate([np.empty((0, patch_values), np.uint8), *(visual.patches for visual in visuals)]),
            patch_frames=np.array([_frames_of_patch(visual.num_frames, self.layout) for visual in visuals], np.uint8),
            grids=np.array([visual.grid for visual in visuals], np.int32).reshape(-1, 3),
            grid_kinds=np.array([GRID_KINDS[visual.kind] for visual in visuals], np.uint8),
            grid_seconds=np.array([visual.seconds(tp) for visual in visuals], np.float32),
        )

    def _pieces(self, given: DecodedInput, visuals: Sequence[VisionInput]) -> list[Piece]:
        spans = [span for visual in visuals for span in self.spans(visual)]
        return input_pieces(self.prompt.template, given.instruction, given.text, spans)

    def spans(self, visual: VisionInput) -> list[Span]:
        """Return one span, or one for each temporal patch of a video where the family writes times."""
        t, h, w = visual.grid
        tokens = h * w // self.layout.merge_patches**2
        if visual.kind == "image" or not self._family.timestamps:
            return [Span(visual.kind, t * tokens)]
        times_s = patch_times_s(visual.times_s, visual.num_frames, self.layout.temporal_patch_frames)
        return [Span("video", tokens, f"<{time_s:.1f} seconds>") for time_s in times_s]

    def vision_inputs(self, visuals: Sequence[Visual]) -> list[VisionInput]:
        """Return visuals resized and cut into patches. Raises `BadMedia` for a shape that the backbone cannot take."""
        frame_tokens = TEMPLATES[self.prompt.template].frame_tokens
        low, high = self.prompt.min_visual_tokens, self.prompt.max_visual_tokens
        inputs = []
        for visual in visuals:
            if visual.kind != "video":
                inputs.append(self._vision_input("image", visual.frames, low, high))
            elif frame_tokens:
                inputs += [self._vision_input("image", frame[None], *frame_tokens) for frame in visual.frames]
            else:
                groups = math.ceil(len(visual.frames) / self.layout.temporal_patch_frames)
                share = max(1, high // groups)
                inputs.append(self._vision_input("video", visual.frames, min(low, share), share, visual.times_s))
        return inputs

    def _vision_input(
        self,
        kind: VisionKind,
        frames: UInt8Array,
        low_tokens: int,
        high_tokens: int,
        times_s: tuple[float, ...] = (),
    ) -> VisionInput:
        factor_px = self.layout.factor_px
        _, height, width, _ = frames.shape
        size = smart_resize(height, width, factor_px, low_tokens * factor_px**2, high_tokens * factor_px**2)
        return VisionInput(kind, *patchify(resize(frames, *size), self.layout), len(frames), times_s)

    def _ids(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Return token ids, and which of them are the instruction's. Instruction and text share `max_text_tokens`."""
        ids: list[int] = []
        instruction: list[bool] = []
        left = self.prompt.max_text_tokens
        for piece in pieces:
            if piece.kind in ("instruction", "text"):
                some = self.text_ids(piece.text)[:left]
                left -= len(some)
            else:
                some = self._fixed_ids(piece)
            ids += some
            instruction += [piece.kind == "instruction"] * len(some)
        return ids, instruction

    def _fixed_ids(self, piece: Piece) -> list[int]:
        if piece.text not in self._known_ids:
            ids = [self.special_id(piece.text)] if piece.kind == "special" else self.text_ids(piece.text)
            self._known_ids[piece.text] = ids
        return self._known_ids[piece.text] * piece.count

    @cached_property
    def _known_ids(self) -> dict[str, list[int]]:
        return {}

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text. Names of special tokens in it are text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the start of a text that has at most `max_tokens` tokens."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= max_tokens:
            return text
        # Several tokens may share a character: it is kept whole or not at all.
        return text[: min(offsets[max_tokens - 1][1], offsets[max_tokens][0])]

    def special_id(self, token: str) -> int:
        """Return the id of a special token. Raises `UserError` if the tokenizer has none."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(self.model_dir, f"the tokenizer has no {token}", "name a checkpoint of a Qwen-VL family")
        return token_id

    @cached_property
    def _family(self) -> Family:
        return read_family(Path(self.model_dir))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        path = Path(self.model_dir) / "tokenizer.json"
        if not path.exists():
            raise UserError(str(path), "does not exist", "name the directory of a checkpoint with a fast tokenizer")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "<|im_end|>" in a user's text is text
        return tokenizer
