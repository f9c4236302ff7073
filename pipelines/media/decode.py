"""Members of a sample to pixels: `decode_sample` in this process, `Decoder` also in a killable child."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.documents import render_page
from pipelines.media.images import decode_image
from pipelines.media.materialized import is_page_image
from pipelines.media.sandbox import Sandbox
from pipelines.media.videos import decode_video
from pipelines.samples import DecodedInput, DecodedSample, Input, MediaKind, Sample, UInt8Array, Visual


def decode_pixels(kind: MediaKind, data: bytes, config: MediaConfig) -> tuple[UInt8Array, list[float]]:
    """Return RGB frames `[T, H, W, 3]` of one member, and for a video when each is shown, in seconds from its start.

    T is 1 for an image and for a document, which is one page or the image of a page.
    """
    match kind:
        case "image":
            return decode_image(data, config, config.image_pixels)[None], []
        case "document":
            if is_page_image(data):
                return decode_image(data, config, config.image_pixels)[None], []
            return render_page(data, 0, config)[None], []
        case "video":
            return decode_video(data, config)


def decode_member(kind: MediaKind, data: bytes, config: MediaConfig) -> Visual:
    """Decode one member in this process. Raises `BadMedia`: empty_file, too_many_bytes, the reasons of its decoder."""
    _check_bytes(data, config)
    frames, times_s = decode_pixels(kind, data, config)
    return Visual(kind, frames, tuple(times_s))


def decode_sample(sample: Sample, members: dict[str, bytes], config: MediaConfig, instructions: bool) -> DecodedSample:
    """Decode all inputs of a sample, with the bytes of its media in `members`.

    With `instructions`, the query gets the sample's instruction, and the positive and negatives get its target
    instruction. Without, all are empty. Raises `BadMedia`: missing_member, and the reasons of `decode_member`.
    """
    return _decode_inputs(sample, members, instructions, lambda kind, data: decode_member(kind, data, config))


class Decoder:
    """Decodes for one worker: in process for trusted files, in a sandbox with `isolated`, and always for decord."""

    def __init__(self, config: MediaConfig, isolated: bool = False) -> None:
        self._config = config
        self._isolated = isolated
        self._sandbox = Sandbox(config)

    def member(self, kind: MediaKind, data: bytes) -> Visual:
        """Decode as `decode_member` does. A sandbox adds its own reasons."""
        if not (self._isolated or (kind == "video" and self._config.video_backend == "decord")):
            return decode_member(kind, data, self._config)
        _check_bytes(data, self._config)
        frames, times_s = self._sandbox.call(decode_pixels, kind, data, self._config)
        return Visual(kind, frames, tuple(times_s))

    def sample(self, sample: Sample, members: dict[str, bytes], instructions: bool) -> DecodedSample:
        """Decode as `decode_sample` does."""
        return _decode_inputs(sample, members, instructions, self.member)

    def close(self) -> None:
        """End the child, if one was started."""
        self._sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _decode_inputs(
    sample: Sample, members: dict[str, bytes], instructions: bool, decode: Callable[[MediaKind, bytes], Visual]
) -> DecodedSample:
    def decoded(part: Input, instruction: str) -> DecodedInput:
        missing = [media.member for media in part.media if media.member not in members]
        if missing:
            raise BadMedia("missing_member", missing[0])
        visuals = tuple(decode(media.kind, members[media.member]) for media in part.media)
        return DecodedInput(part.text, visuals, instruction if instructions else "")

    return DecodedSample(
        sample=sample,
        query=decoded(sample.query, sample.instruction),
        positive=decoded(sample.positive, sample.target_instruction),
        negatives=tuple(decoded(negative, sample.target_instruction) for negative in sample.negatives),
    )


def _check_bytes(data: bytes, config: MediaConfig) -> None:
    if len(data) > config.max_bytes:
        raise BadMedia("too_many_bytes", f"{len(data)} > {config.max_bytes}")
