"""Segments of a video as files of their own, for players: packets are copied, and nothing is decoded or encoded."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np

from pipelines.config import MediaConfig
from pipelines.media.videos import ScannedVideo, named_damage, open_video
from pipelines.samples import TimeRange, UInt8Array

MOST_BYTES = 64 << 20
"""Bytes of a clip, at most."""
_WEBM = ("vp8", "vp9", "av1")
_SOUND = {"webm": ("opus", "vorbis"), "mp4": ("aac", "mp3", "opus", "flac")}


def cut_video(data: bytes, segment: TimeRange | None, config: MediaConfig) -> tuple[UInt8Array, dict[str, Any]] | None:
    """Return the bytes of a clip, and its other fields. `segment` None is the whole video.

    None if packets cannot be copied: without an index, or if there would be more than `MOST_BYTES`. Raises `BadMedia`
    as `decode_video` does.
    """
    video = ScannedVideo(data, config)
    segment = segment or TimeRange(0.0, video.length_s)
    if (key := video.key_before(segment.start_s)) is None:
        return None
    key_s = key[-1]
    sink = io.BytesIO()
    with named_damage(), open_video(data) as source:
        kind = "webm" if _codec(source.streams.best("video")) in _WEBM else "mp4"
        if not _copy(source, sink, kind, key, segment.end_s):
            return None
    fields = {"media_type": f"video/{kind}", "start_s": segment.start_s - key_s, "end_s": segment.end_s - key_s}
    return np.frombuffer(sink.getvalue(), np.uint8), fields


def _copy(source: Any, sink: io.BytesIO, kind: str, key: tuple[int, int, float], end_s: float) -> bool:
    """Copy packets from a key frame on. Return False if there are none or too many."""
    stream, sound = source.streams.best("video"), source.streams.best("audio")
    if sound is not None and (sound.codec_context is None or _codec(sound) not in _SOUND[kind]):
        sound = None
    sought_pts, key_pts, key_s = key
    first_s = float(key_pts * stream.time_base)
    last_s = first_s + end_s - key_s
    pictures: list[Any] = []
    sounds: list[Any] = []
    num_bytes = 0
    source.seek(sought_pts, stream=stream)
    for packet in source.demux([stream] if sound is None else [stream, sound]):
        if packet.size == 0 or packet.pts is None:
            continue
        at_s = float((packet.pts if packet.dts is None else packet.dts) * packet.time_base)
        if packet.stream_index != stream.index:
            if first_s <= at_s < last_s:
                sounds.append(packet)
        elif at_s >= last_s:  # in the order of decoding: all that are shown before the end have come
            break
        elif packet.pts == key_pts or (pictures and packet.pts > key_pts):  # those before lack what they refer to
            pictures.append(packet)
        num_bytes += packet.size
        if num_bytes > MOST_BYTES:
            return False
    if not pictures:
        return False
    # Some containers do not store when a picture is decoded: any increasing times before it is shown will do.
    shown = sorted(packet.pts for packet in pictures)
    delay = max(at - packet.pts for at, packet in zip(shown, pictures, strict=True))
    with av.open(sink, "w", format=kind) as target:
        copy = target.add_stream_from_template(stream)
        sound_copy = None if sound is None else target.add_stream_from_template(sound)
        for packet, at in zip(pictures, shown, strict=True):
            packet.pts, packet.dts, packet.stream = packet.pts - key_pts, at - delay - key_pts, copy
            target.mux(packet)
        for packet in sounds:
            packet.pts -= round(first_s / packet.time_base)
            packet.dts, packet.stream = packet.pts, sound_copy
            target.mux(packet)
    return True


def _codec(stream: Any) -> str:
    return str(stream.codec_context.codec.canonical_name)
