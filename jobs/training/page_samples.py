"""Samples and answers on the page of a run: read from the dataset, as small pictures and texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, Rejected, UInt8Array

if TYPE_CHECKING:
    from rzen.report.hits import Hit, Search
    from rzen.report.run import Answer
    from rzen.training.held_out_scores import HeldOutRow, SourceScore

_PIXELS = 480 * 160  # of a picture on the page
_SAMPLES = 2  # of each source
_SOURCES = 6  # with samples and answers


def training_samples(data: DataConfig, sources: Sequence[str]) -> Iterator[Search]:
    """Yield the first samples of each source: the query, and its target as the only hit."""
    from rzen.report.hits import Search

    reader = _reader(data)
    for source in sources[:_SOURCES]:
        for row in range(min(_SAMPLES, reader.sizes()[source])):
            if sample := _Shown.read(reader, source, row):
                yield Search(sample.text, [sample.hit(1, "", is_relevant=True)], sample.frames)


def answers(data: DataConfig, scores: Sequence[HeldOutRow]) -> Iterator[Answer]:
    """Yield, of each source, a query that is found now and was not, and one that is not found."""
    from rzen.report.hits import Search
    from rzen.report.run import Answer

    reader = _reader(data)
    first, last = scores[0], scores[-1]
    for source, now in list(last["sources"].items())[:_SOURCES]:
        before = first["sources"].get(source, now)
        for place, verdict in _chosen(before, now):
            if asked := _Shown.read(reader, source, now["queries"][place]):
                hits = [
                    found.hit(1, f"first after {step:,} steps", is_relevant=score["ranks"][place] == 1)
                    for step, score in ((first["step"], before), (last["step"], now))
                    if (found := _Shown.read(reader, source, score["found"][place]))
                ]
                if now["ranks"][place] > 1:
                    hits.append(asked.hit(now["ranks"][place], "what is wanted", is_relevant=True))
                yield Answer(f"{source}: {verdict}", Search(asked.text, hits, asked.frames))


def _chosen(before: SourceScore, now: SourceScore) -> Iterator[tuple[int, str]]:
    """Yield places of queries, and what became of them."""
    ranks = list(enumerate(zip(before["ranks"], now["ranks"], strict=True)))
    learned = [place for place, (old, new) in ranks if old > 1 and new == 1]
    missed = [place for place, (_, new) in ranks if new > 1]
    if learned:
        yield learned[0], f"found now, rank {before['ranks'][learned[0]]} before"
    if missed:
        yield missed[0], f"not found: rank {now['ranks'][missed[0]]} now, {before['ranks'][missed[0]]} before"


def _reader(data: DataConfig) -> Reader:
    media = data.media.model_copy(update={"image_pixels": _PIXELS, "page_pixels": _PIXELS})
    return Reader(data.model_copy(update={"media": media, "negatives_per_sample": 0}))


@dataclass(frozen=True)
class _Shown:
    """A sample as the page shows it."""

    decoded: DecodedSample

    @classmethod
    def read(cls, reader: Reader, source: str, row: int) -> _Shown | None:
        """Return a sample of the dataset. None if it cannot be decoded."""
        (found,) = reader.samples(source, [row])
        return None if isinstance(found, Rejected) else cls(found)

    @property
    def text(self) -> str:
        """What the query says, or where it comes from if it says nothing."""
        return self.decoded.query.text or self.decoded.sample.origin

    @property
    def frames(self) -> list[UInt8Array]:
        """Pictures of the query."""
        return self.decoded.query.frames

    def hit(self, rank: int, origin: str, *, is_relevant: bool) -> Hit:
        """The target, with a note of where it comes from: by default what the data say."""
        from rzen.report.hits import Hit

        sample, target = self.decoded.sample, self.decoded.positive
        title = sample.query.text if target.visuals else target.text
        return Hit(rank, None, sample.positive.modality, title, origin or sample.origin, target.frames, is_relevant)
