"""Samples that show what an evaluation set asks or answers: equal files, similar media, words in a row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.curate.features import Inputs
from pipelines.curate.hamming import Hashes, Ints, near_matches
from pipelines.curate.samples import Drop, Samples
from pipelines.curate.settings import LeakageRule
from pipelines.curate.similarity import media_similar
from pipelines.curate.tables import Bools, MediaTable, TextTable

FILE, MEDIA, TEXT = "leak_file", "leak_media", "leak_text"


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """Some inputs of an evaluation set: queries and candidates."""

    dataset: str
    inputs: Sequence[Inputs]
    texts: TextTable
    media: MediaTable

    def name(self, place: int) -> str:
        """Return what an input is called in reports: `dataset/name`."""
        return f"{self.dataset}/{self.texts.keys[place].as_py()}"

    def leak(self, input: int, place: int, reason: str) -> Drop:
        """Return the drop of a sample whose input resembles one of these."""
        row = place
        for some in self.inputs:
            if row < len(some):
                return Drop(input // 2, reason, 0.0, self.name(place), (some, row))
            row -= len(some)
        raise IndexError(place)


def find_leaks(
    samples: Samples, keep: Bools, evaluation: Callable[[], Iterable[EvaluationInputs]], rule: LeakageRule
) -> list[Drop]:
    """Return the samples with an input that leaks. `evaluation` yields all inputs to compare with, twice the same.

    A sample has one reason: an equal file before similar media, before a text.
    """
    inputs = np.repeat(keep, 2)
    template = template_ngrams((some.texts for some in evaluation()), rule.max_texts)
    finders = {FILE: _equal_files, MEDIA: _similar_media}
    found: dict[str, dict[int, Drop]] = {FILE: {}, MEDIA: {}, TEXT: {}}
    for some in evaluation():
        for reason, finder in finders.items():
            for place, other in finder(samples, inputs, some, rule):
                found[reason].setdefault(place // 2, some.leak(place, other, reason))
        for place, other in _common_words(samples, inputs, some, template):
            found[TEXT].setdefault(place // 2, some.leak(place, other, TEXT))
    return list((found[TEXT] | found[MEDIA] | found[FILE]).values())


def template_ngrams(tables: Iterable[TextTable], max_texts: int) -> Hashes:
    """Return the n-grams that more than `max_texts` different texts have in common, sorted."""
    seen: set[bytes] = set()
    found = []
    for table in tables:
        for place, text in enumerate(table.texts.to_pylist()):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                found.append(table.ngrams[int(table.bounds[place]) : int(table.bounds[place + 1])])
    values, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]), return_counts=True)
    return np.asarray(values[counts > max_texts])


def _equal_files(
    samples: Samples, inputs: Bools, some: EvaluationInputs, rule: LeakageRule
) -> Iterator[tuple[int, int]]:
    content = np.where(inputs, samples.media.content, np.uint64(0))
    yield from _equal_values(content, some.media.content)


def _similar_media(
    samples: Samples, inputs: Bools, some: EvaluationInputs, rule: LeakageRule
) -> Iterator[tuple[int, int]]:
    mine = np.flatnonzero(inputs & (samples.media.num_frames > 0))
    theirs = np.flatnonzero(some.media.num_frames > 0)
    hashes, others = samples.media.middle[mine], some.media.middle[theirs]
    for left, right in near_matches(hashes, others, rule.media.hash_bits):
        left, right = mine[left], theirs[right]
        similar = media_similar(samples.media, left, some.media, right, rule.media, any_kind=True)
        yield from zip(left[similar].tolist(), right[similar].tolist(), strict=True)


def _common_words(
    samples: Samples, inputs: Bools, some: EvaluationInputs, template: Hashes
) -> Iterator[tuple[int, int]]:
    texts = samples.texts
    input_of = np.repeat(np.arange(len(inputs)), np.diff(texts.bounds))
    other_of = np.repeat(np.arange(len(some.texts.content)), np.diff(some.texts.bounds))
    counts = inputs[input_of] & ~np.isin(texts.ngrams, template)
    for place, other in _equal_values(texts.ngrams[counts], some.texts.ngrams):
        yield int(input_of[counts][place]), int(other_of[other])


def _equal_values(values: Hashes, others: Hashes) -> Iterator[tuple[int, int]]:
    """Yield (place, place of the first equal one in `others`). Zeros are equal to nothing."""
    known, first = np.unique(others, return_index=True)
    if not known.size:
        return
    place: Ints = np.minimum(np.searchsorted(known, values), known.size - 1)
    equal = np.flatnonzero((known[place] == values) & (values != 0))
    yield from zip(equal.tolist(), first[place[equal]].tolist(), strict=True)
