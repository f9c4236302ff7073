"""The targets of a corpus as pictures, from the dataset that was embedded."""

from __future__ import annotations

import io

from PIL import Image

from jobs.runtime.progress import say
from pipelines.config import DataConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader, Role
from pipelines.redaction import has_hidden
from pipelines.samples import Clip, DecodedInput, Rejected, TimeRange, UInt8Array
from rzen.embedding.corpus import CorpusHit, VectorsFile

_THUMBNAIL_PX = 480


class Targets:
    """Decoded targets. There are none of a split whose data changed after they were embedded, or cannot be read.

    The hits still hold then: vector, title and origin were stored together.
    """

    def __init__(self, manifest: VectorsFile) -> None:
        # Vectors may come from others, and trust is the user's to give: `embed` does not record it.
        self._data = manifest["data"].model_copy(update={"trusted": False})
        if has_hidden(self._data.endpoint):  # the environment knows the one with the password
            self._data = self._data.model_copy(update={"endpoint": None})
        self._fingerprints = manifest.get("fingerprints", {})
        # One reader for each split, because each reader starts a process for untrusted media.
        self._readers: dict[str, Reader | None] = {}

    def pictures(self, hit: CorpusHit) -> list[UInt8Array]:
        """Return the target's frames; none for a text, or where the file has become unreadable."""
        target = None if hit.modality == "text" else self.read(*hit.target, hit.segment)
        return target.frames if target else []

    def read(self, split: str, source: str, index: int, segment: TimeRange | None = None) -> DecodedInput | None:
        """Return a target, or a segment of a video.

        None for one that the data do not have, or where its file has become unreadable.
        """
        return self._input(split, source, index, "positive", segment)

    def query(self, split: str, source: str, index: int) -> DecodedInput | None:
        """Return the query of a target. None if it has none, or where it cannot be read."""
        query = self._input(split, source, index, "query")
        return query if query and (query.text or query.visuals) else None

    def clip(self, split: str, source: str, index: int, segment: TimeRange | None) -> Clip | None:
        """Return a video, or a segment of it, as a file that a browser plays. None where there is none."""
        reader = self._reader(split, source, index)
        try:
            return None if reader is None else reader.clip(source, index, segment)
        except BadMedia:
            return None
        except UserError as error:
            self._give_up(split, error)
            return None

    def _input(
        self, split: str, source: str, index: int, role: Role, segment: TimeRange | None = None
    ) -> DecodedInput | None:
        reader = self._reader(split, source, index)
        if reader is None:
            return None
        try:
            if segment is None:
                (found,) = reader.inputs(source, [(index, role)])
            else:
                (found,) = reader.segments(source, index, [segment])
        except UserError as error:
            self._give_up(split, error)
            return None
        return None if isinstance(found, Rejected) else found

    def _reader(self, split: str, source: str, index: int) -> Reader | None:
        """Return what reads a target, None if the data do not have it."""
        try:
            if split not in self._readers:
                self._readers[split] = self._checked(self._data.model_copy(update={"split": split}))
            reader = self._readers[split]
            return None if reader is None or index not in range(reader.sizes().get(source, 0)) else reader
        except UserError as error:
            self._give_up(split, error)
            return None

    def _give_up(self, split: str, error: UserError) -> None:
        say(f"  hits of {split} have no pictures: {error}", "yellow")
        self._readers[split] = None

    def _checked(self, data: DataConfig) -> Reader:
        """Return a reader of the data that was embedded. Raises `UserError` for other data."""
        reader = Reader(data)
        if reader.fingerprint != self._fingerprints.get(data.split):
            fix = "run `rzen embed` again"
            raise UserError(f"{data.root} {data.split}", "changed after it was embedded", fix)
        return reader


def thumbnail(frames: list[UInt8Array]) -> bytes:
    """Return the middle frame as a small WebP."""
    picture = Image.fromarray(frames[len(frames) // 2])
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    sink = io.BytesIO()
    picture.save(sink, "WEBP", quality=80)
    return sink.getvalue()
