"""Members of a sample to pixels: `decode_sample` in this process, or through `Decoder` in a killable child."""

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
    """RGB frames `[T, H, W, 3]` of one member, and of a video when each is shown, in seconds from its start.

    T is 1 for an image, and for a document: one page, or its image.
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
    """One member in this process. Raises `BadMedia`: empty_file, too_many_bytes, and the reasons of its decoder."""
    _check_bytes(data, config)
    frames, times_s = decode_pixels(kind, data, config)
    return Visual(kind, frames, tuple(times_s))


def decode_sample(sample: Sample, members: dict[str, bytes], config: MediaConfig, instructions: bool) -> DecodedSample:
    """All sides of a sample, `members` holding the bytes of every medium it names.

    With `instructions`, the query carries the sample's instruction and the positive and negatives its target
    instruction; without, all are empty. Raises `BadMedia`: missing_member, and the reasons of `decode_member`.
    """
    return _decode_sides(sample, members, instructions, lambda kind, data: decode_member(kind, data, config))


class Decoder:
    """Decodes for one worker: in process for files one trusts, in a sandbox with `isolated`, and always for decord."""

    def __init__(self, config: MediaConfig, isolated: bool = False) -> None:
        self._config = config
        self._isolated = isolated
        self._sandbox = Sandbox(config)

    def member(self, kind: MediaKind, data: bytes) -> Visual:
        """As `decode_member`, and with the reasons of the sandbox where one is used."""
        if not (self._isolated or (kind == "video" and self._config.video_backend == "decord")):
            return decode_member(kind, data, self._config)
        _check_bytes(data, self._config)
        frames, times_s = self._sandbox.call(decode_pixels, kind, data, self._config)
        return Visual(kind, frames, tuple(times_s))

    def sample(self, sample: Sample, members: dict[str, bytes], instructions: bool) -> DecodedSample:
        """As `decode_sample`."""
        return _decode_sides(sample, members, instructions, self.member)

    def close(self) -> None:
        """Ends the child, if one was started."""
        self._sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _decode_sides(
    sample: Sample, members: dict[str, bytes], instructions: bool, decode: Callable[[MediaKind, bytes], Visual]
) -> DecodedSample:
    def decoded(side: Input, instruction: str) -> DecodedInput:
        missing = [media.member for media in side.media if media.member not in members]
        if missing:
            raise BadMedia("missing_member", missing[0])
        visuals = tuple(decode(media.kind, members[media.member]) for media in side.media)
        return DecodedInput(side.text, visuals, instruction if instructions else "")

    return DecodedSample(
        sample=sample,
        query=decoded(sample.query, sample.instruction),
        positive=decoded(sample.positive, sample.target_instruction),
        negatives=tuple(decoded(negative, sample.target_instruction) for negative in sample.negatives),
    )


def _check_bytes(data: bytes, config: MediaConfig) -> None:
    if len(data) > config.max_bytes:
        raise BadMedia("too_many_bytes", f"{len(data)} > {config.max_bytes}")
