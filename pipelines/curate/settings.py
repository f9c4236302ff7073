"""Settings of the rules of curation. A rule whose settings are null is off."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Config, Fraction, NonNegativeInt, PositiveFloat, PositiveInt

Cosine = Annotated[float, Field(ge=-1, le=1)]


class ExactRule(Config):
    """Leave out pairs whose content an earlier pair of the split has."""

    of: Literal["pair", "target"] = "pair"
    """`pair`: query and target are equal. `target`: equal targets with media are enough. Targets that are texts only,
    such as names of classes, may be equal in different pairs. They are compared as pairs."""


class FilterRule(Config):
    """Leave out samples by what one of their inputs is. Each limit that is null is off."""

    bad_media: bool = True
    """Leave out samples whose media cannot be decoded. Training would replace and count them."""
    min_side_px: PositiveInt | None = None
    """Shortest side of images and videos, in pixels of the file."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longest side of a medium, divided by its shortest side."""
    min_text_chars: PositiveInt | None = None
    """Shortest text, in characters. Inputs without a text are not judged."""
    max_text_chars: PositiveInt | None = None
    """Longest text, in characters."""
    languages: Annotated[list[str], Field(min_length=1)] | None = None
    """Languages to keep, as ISO 639-1 codes such as `en`, by py3langid. Texts of fewer than
    `min_language_chars` characters are kept."""
    min_language_confidence: Fraction = 0.9
    """A text is of another language only if the detector is at least so sure."""
    min_language_chars: PositiveInt = 24
    """Shorter texts are not judged: their language is a guess."""


class MediaSimilarity(Config):
    """When two media show the same. The defaults bear new encodings, sizes and crops of a few percent."""

    hash_bits: Annotated[int, Field(ge=0, le=11)] = 10
    """At most this many of the 64 bits of the difference hash (dHash) differ. All such pairs are found."""
    color: PositiveFloat = 6.0
    """Mean difference, of 255, between the colors of both media in a grid of 16 x 16."""
    page_color: PositiveFloat = 3.0
    """The same for document pages: pages of one layout look similar."""
    page_cell: PositiveFloat = 12.0
    """Largest difference, of 255, in one cell of the grid of two pages: a changed line shows there."""


class TextSimilarity(Config):
    """When two texts say the same."""

    jaccard: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of their 5-character pieces that two texts have in common. Case, spaces and marks do not count. MinHash
    proposes pairs, and the true share decides."""


class NearRule(Config):
    """Leave out near duplicates: pairs that are similar to a pair that is kept, in query and target."""

    of: Literal["pair", "target"] = "pair"
    """`pair`: queries and targets must be similar. `target`: similar targets with media are enough, whatever the
    queries say. Targets that are texts only are compared as pairs."""
    media: MediaSimilarity = MediaSimilarity()
    """When two images, pages or videos are similar."""
    text: TextSimilarity = TextSimilarity()
    """When two texts are similar."""


class LeakageRule(Config):
    """Leave out samples that show what an evaluation set asks or answers."""

    held_out: bool = True
    """Compare with the split `held_out` of the same dataset, if it has one."""
    data: list[str] = Field(default_factory=list)
    """More datasets, as directories or s3:// URLs, whose split `held_out` is compared."""
    suites: dict[Literal["MMEB-V2", "M-BEIR", "M-BEIR global"], str] = Field(default_factory=dict)
    """Benchmark -> its local folder, the same on all nodes, as for `rzen evaluate`."""
    custom: dict[str, str] = Field(default_factory=dict)
    """Name -> retrieval dataset of your own, as for `rzen evaluate`."""
    datasets: Annotated[list[str], Field(min_length=1)] | None = None
    """Datasets of the suites to compare with. `null` takes all that are there."""
    candidates: Literal["all", "relevant"] = "all"
    """Candidates to compare with, in addition to the queries: all, or right answers only."""
    media: MediaSimilarity = MediaSimilarity()
    """When a medium is that of an evaluation set. Equal files are always found."""
    ngram_words: Annotated[int, Field(ge=3)] = 13
    """A text leaks if it has this many words in a row in common with a text of an evaluation set."""
    min_words: Annotated[int, Field(ge=1)] = 6
    """Shorter texts of at least this many words leak if they are equal as a whole. Still shorter ones, such as names of
    classes, never do."""
    max_texts: PositiveInt = 10
    """Words in a row that more texts of the evaluation sets have in common are their template, and do not count."""


class AlignmentRule(Config):
    """Leave out the pairs whose query and target the model finds least similar. Graded pairs stay."""

    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the pairs that is left out, by their cosine."""
    per: Literal["source", "task"] = "source"
    """Where the share is taken: cosines of other tasks are on other scales."""
    min_cosine: Cosine | None = None
    """Pairs below this cosine are left out, too."""


class SemanticRule(Config):
    """Leave out semantic duplicates by vectors of the targets (SemDeDup, arXiv 2303.09540)."""

    cosine: Cosine | None = 0.98
    """Targets of one cluster above this cosine are duplicates. `null` finds none. The value belongs to one model: look
    at the examples of the report."""
    keep: Literal["farthest", "nearest"] = "farthest"
    """Which duplicate stays: the one farthest from the center of the cluster, as in the paper, or the nearest."""
    cluster_samples: PositiveInt = 1024
    """Samples of a cluster of k-means in the mean. The time of the comparison grows with it."""
    max_per_cluster: PositiveInt | None = None
    """At most this many samples of a cluster stay, by a hash of their content and the seed."""
    full_clusters: Literal["drop", "weigh"] = "drop"
    """`weigh` keeps all samples of a cluster of n > `max_per_cluster`. Their weight is `max_per_cluster` / n, and each
    epoch draws others of them: about `max_per_cluster` of each cluster."""


class CurationRules(Config):
    """The rules, in the order in which they are applied. Each sees the samples that the earlier ones have kept."""

    exact: ExactRule | None = ExactRule()
    """Exact duplicates, by the hashes in the shards."""
    filters: FilterRule | None = FilterRule()
    """Limits for sizes, texts and languages."""
    near: NearRule | None = NearRule()
    """Near duplicates of images, pages, videos and texts."""
    leakage: LeakageRule | None = LeakageRule()
    """Overlap with evaluation sets."""
    alignment: AlignmentRule | None = None
    """Pairs that do not fit together, by a model."""
    semantic: SemanticRule | None = None
    """Semantic duplicates, by a model."""
    within: Literal["all", "source"] = "all"
    """Where duplicates are looked for: among all samples, or among those of one source."""
    seed: NonNegativeInt = 0
    """Seed of k-means and of the choice within full clusters."""

    @property
    def needs_model(self) -> bool:
        """Return whether a rule needs vectors."""
        return self.alignment is not None or self.semantic is not None

    @property
    def needs_media(self) -> bool:
        """Return whether a rule looks at pixels."""
        filters = self.filters
        looks = filters and (filters.bad_media or filters.min_side_px or filters.max_aspect_ratio)
        return bool(looks or self.near or self.leakage)
