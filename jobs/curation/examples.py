"""Samples that were left out, next to what they resemble, and targets of full clusters, with pictures."""

from __future__ import annotations

import numpy as np

from jobs.curation.specs import CurateSpec
from pipelines.curate.features import FeatureSettings, Inputs, ShardInputs
from pipelines.curate.samples import Drop, Samples, Verdicts
from pipelines.errors import BadMedia
from pipelines.feed.reader import Reader
from pipelines.items.decode import ItemDecoder
from pipelines.samples import DecodedInput, DecodedSample, Rejected
from rzen.report.curation import ClusterExample, DropExample
from rzen.report.hits import Hit

_MAX_CHARS = 300


def drop_examples(
    spec: CurateSpec, samples: Samples, verdicts: Verdicts, settings: FeatureSettings
) -> dict[str, list[DropExample]]:
    """Return reason -> some samples, evenly spread over those that were left out for it."""
    by_reason: dict[str, list[Drop]] = {}
    for drop in verdicts.drops:
        by_reason.setdefault(drop.reason, []).append(drop)
    pictures = _Pictures(spec, samples, settings)
    found: dict[str, list[DropExample]] = {}
    for reason, drops in by_reason.items():
        places = np.linspace(0, len(drops) - 1, min(spec.num_examples, len(drops)), dtype=int)
        for drop in (drops[place] for place in places.tolist()):
            example = DropExample(samples.name(drop.sample), drop.other, drop.value, pictures.of_drop(drop))
            found.setdefault(reason, []).append(example)
    return found


def cluster_examples(
    spec: CurateSpec, samples: Samples, verdicts: Verdicts, settings: FeatureSettings
) -> list[ClusterExample]:
    """Return the largest full clusters, each with some of its targets."""
    largest = sorted(verdicts.full_clusters, key=lambda some: -some.num_samples)[: spec.num_examples]
    pictures = _Pictures(spec, samples, settings)
    return [
        ClusterExample(some.num_samples, some.sources, some.weight, [pictures.target(one) for one in some.examples])
        for some in largest
    ]


class _Pictures:
    """Decodes what the report shows."""

    def __init__(self, spec: CurateSpec, samples: Samples, settings: FeatureSettings) -> None:
        self._samples, self._settings = samples, settings
        self._data = spec.data.model_copy(update={"media": settings.media, "negatives_per_sample": 0})
        self._reader = Reader(self._data)
        self._items = ItemDecoder(settings.media)

    def of_drop(self, drop: Drop) -> list[Hit]:
        """Return both inputs of the sample, then what they resemble."""
        source, index = self._samples.place(drop.sample)
        shown = self._sample(self._reader, source, index, "left out")
        if isinstance(drop.like, int):
            return shown + self._sample(self._reader, *self._samples.place(drop.like), "kept")
        return shown + (self._evaluation(*drop.like) if drop.like else [])

    def target(self, sample: int) -> Hit:
        """Return the target of a sample, or why it cannot be shown."""
        return self._sample(self._reader, *self._samples.place(sample), self._samples.name(sample))[-1]

    def _sample(self, reader: Reader, source: str, index: int, what: str) -> list[Hit]:
        (found,) = reader.samples(source, [index])
        if isinstance(found, Rejected):
            return [Hit(0, None, "text", found.reason, f"{what}: {found.origin}")]
        assert isinstance(found, DecodedSample)
        return [_hit(found.query, f"{what}: query"), _hit(found.positive, f"{what}: target")]

    def _evaluation(self, inputs: Inputs, row: int) -> list[Hit]:
        what = "evaluation set"
        if isinstance(inputs, ShardInputs):
            reader = Reader(inputs.data.model_copy(update={"media": self._settings.media, "negatives_per_sample": 0}))
            shard = inputs.shard
            return self._sample(reader, shard.source, shard.start + row // 2, what)[row % 2 :][:1]
        item = inputs.items[row]
        try:
            return [_hit(self._items.input(item), f"{what}: {item.name}")]
        except BadMedia as error:
            return [Hit(0, None, "text", error.reason, f"{what}: {item.name}")]


def _hit(shown: DecodedInput, origin: str) -> Hit:
    names = {"image": "image", "video": "video", "document": "page"}
    modality = names[shown.visuals[0].kind] if shown.visuals else "text"
    text = shown.text if len(shown.text) <= _MAX_CHARS else f"{shown.text[:_MAX_CHARS]}..."
    return Hit(0, None, modality, text, origin, shown.frames)  # type: ignore[arg-type]
