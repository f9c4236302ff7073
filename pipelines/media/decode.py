"""Members of a sample to pixels: `decode_sample` in this process, `Decoder` in a killable child if untrusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.cache import CachedDecoder, PixelCache, Pixels
from pipelines.media.documents import extract_page, num_pages, render_page
from pipelines.media.images import decode_image
from pipelines.media.materialized import is_page_image
from pipelines.media.sandbox import Sandbox
from pipelines.media.signatures import is_heif
from pipelines.media.video_clip import cut_video
from pipelines.media.video_segments import each_segment, video_length
from pipelines.media.videos import decode_video
from pipelines.samples import Clip, DecodedInput, DecodedSample, Input, MediaKind, Sample, TimeRange, Visual

Result = TypeVar("Result")


def decode_pixels(kind: MediaKind, data: bytes, config: MediaConfig) -> Pixels:
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


def decode_page(kind: MediaKind, data: bytes, page: int | None, config: MediaConfig) -> Pixels:
    """Decode as `decode_pixels` does: with `page`, that page of a document, counted from zero."""
    return decode_pixels(kind, data if page is None else extract_page(data, page, config), config)


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
    """Decodes for one worker: videos and documents in a sandbox, images and stored page images in this process.

    PIL cannot run away on an image, because its size is limited before it is decoded. HEIF pictures are decoded as
    videos are. `trusted` says that the user made the files: all are then decoded in this process, except by decord.
    `isolated` decodes images in the sandbox, too. What `cache` has is not decoded.
    """

    def __init__(
        self,
        config: MediaConfig,
        *,
        trusted: bool = False,
        isolated: bool = False,
        cache: PixelCache | None = None,
    ) -> None:
        self._config = config
        self._trusted = trusted
        self._isolated = isolated
        self._sandbox = Sandbox(config)
        self._cached = CachedDecoder(cache, config) if cache is not None else None

    def member(self, kind: MediaKind, data: bytes, page: int | None = None) -> Visual:
        """Decode as `decode_member` does. A sandbox adds its own reasons. `page` is that of a document, from zero."""
        _check_bytes(data, self._config)
        pixels = partial(self._caller(kind, data), decode_page, kind, data, page, self._config)
        frames, times_s = self._cached.decode(kind, data, page, pixels) if self._cached else pixels()
        return Visual(kind, frames, tuple(times_s))

    def segments(self, data: bytes, segments: Sequence[TimeRange]) -> Iterator[Visual | BadMedia]:
        """Yield the frames of each segment of a video in order, or why it has none.

        Segments come in the order of their starts. Raises `BadMedia` (too_many_bytes).
        """
        _check_bytes(data, self._config)
        for found in each_segment(self._caller("video", data), data, segments, self._config):
            yield found if isinstance(found, BadMedia) else Visual("video", found[0], tuple(found[1]))

    def video_length(self, data: bytes) -> float:
        """Return the length of a video in seconds. Raises `BadMedia` as `decode_video` does."""
        _check_bytes(data, self._config)
        length_s: float = self._caller("video", data)(video_length, data, self._config)
        return length_s

    def clip(self, data: bytes, segment: TimeRange | None) -> Clip | None:
        """Return a segment of a video as a file that a browser plays, None if it cannot be cut out.

        `segment` None is the whole video. Raises `BadMedia` as `decode_video` does.
        """
        _check_bytes(data, self._config)
        found = self._caller("video", data)(cut_video, data, segment, self._config)
        return None if found is None else Clip(found[0].tobytes(), **found[1])

    def num_pages(self, data: bytes) -> int:
        """Return the number of pages of a document, and 1 for the stored image of a page. Raises `BadMedia`."""
        _check_bytes(data, self._config)
        if is_page_image(data):
            return 1
        return num_pages(data, self._config) if self._trusted else self._sandbox.call(num_pages, data, self._config)

    def _caller(self, kind: MediaKind, data: bytes) -> Callable[..., Any]:
        """Return what calls a function on a file: in the sandbox, or in this process."""
        return self._sandbox.call if self._in_sandbox(kind, data) else _call

    def _in_sandbox(self, kind: MediaKind, data: bytes) -> bool:
        if self._isolated or (kind == "video" and self._config.video_backend == "decord"):
            return True
        is_picture = (kind == "image" and not is_heif(data)) or (kind == "document" and is_page_image(data))
        return not (is_picture or self._trusted)

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


def _call(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


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
