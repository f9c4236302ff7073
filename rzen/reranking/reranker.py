"""The one way from pairs to scores: judging jobs and Python users call `Reranker`."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipelines.config import MediaConfig
from pipelines.errors import UserError
from pipelines.samples import DecodedInput
from rzen.config import Dtype, ModelConfig, PairPromptConfig
from rzen.embedding.embedder import CHUNK_TOKENS, default_dtype
from rzen.embedding.inputs import Embeddable, InputReader, named
from rzen.inputs.processor import EncodedBatch, VisionLayout
from rzen.model.backbone import load_backbone
from rzen.model.checkpoints import check_base, trained_pair_prompt
from rzen.model.chunks import chunks_of
from rzen.model.locate import checkpoint_folder, local_folder
from rzen.model.lora import load_adapter
from rzen.reranking.encoder import JointBatch, JointEncoder, MediumKey
from rzen.reranking.head import answer_direction
from rzen.reranking.model import MediumFeatures, ScoringModel

Scores = npt.NDArray[np.float32]
_CHUNKS_AT_ONCE = 4
"""Chunks whose media are read by the tower before their pairs are grouped by length."""
_FEATURE_CHUNKS = 16
"""Chunks of visual tokens whose features are kept for later pairs."""


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document of `Reranker.rank`. `rank` counts from 1, `index` is its place in the list that was passed."""

    rank: int
    index: int
    score: float


class Reranker:
    """Encoder and model as one: pairs in, scores out. `rzen.load_reranker` makes it.

    `model` is frozen and in evaluation mode. `chunk_tokens` limits what the model reads at once, visual tokens and
    padding included. Scores do not depend on it, but for rounding. `media` says how files become pixels, `endpoint`
    where `s3://` URLs are.
    """

    def __init__(
        self,
        encoder: JointEncoder,
        model: ScoringModel,
        chunk_tokens: int = CHUNK_TOKENS,
        media: MediaConfig | None = None,
        endpoint: str | None = None,
    ) -> None:
        self.encoder = encoder
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.media = (media or MediaConfig()).for_model(encoder.visual_pixels)
        self._reader = InputReader(self.media, endpoint)

    def rank(
        self, query: Embeddable, documents: Iterable[Embeddable], *, instruction: str = "", top_k: int | None = None
    ) -> list[RankedDocument]:
        """Return the documents with the best score first, equal scores in the order that was passed.

        Query and documents are inputs as in `Embedder.encode`. `instruction` says what the query asks for; without one
        it is that of the template. `top_k` keeps that many. Raises the errors of `Embedder.encode`, with `query` or
        `documents[3]` as their place.
        """
        if top_k is not None and top_k < 1:
            raise UserError("top_k", f"is {top_k}", "use at least 1")
        several = list(documents)
        scores = self.predict([(query, document) for document in several], instruction=instruction)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [RankedDocument(rank, int(index), float(scores[index])) for rank, index in enumerate(order, start=1)]

    def predict(self, pairs: Sequence[tuple[Embeddable, Embeddable]], *, instruction: str = "") -> Scores:
        """Return the probability of yes, fp32 `[N]`, for N pairs of a query and a document, in their order.

        An input that comes several times, as the same object, is decoded once. Raises the errors of `Embedder.encode`,
        with `pairs[3] query` as their place.
        """
        if not pairs:
            return np.empty(0, np.float32)
        numbers: tuple[dict[int, int], dict[int, int]] = ({}, {})
        decoded: tuple[list[DecodedInput], list[DecodedInput]] = ([], [])
        for place, pair in enumerate(pairs):
            for side, role in enumerate(("query", "document")):
                if id(pair[side]) not in numbers[side]:
                    with named(f"pairs[{place}] {role}"):
                        decoded[side].append(self._reader.read(pair[side], instruction if side == 0 else ""))
                    numbers[side][id(pair[side])] = len(decoded[side]) - 1
        wanted = np.array([[numbers[side][id(pair[side])] for side in (0, 1)] for pair in pairs], np.int64)
        order = np.lexsort((wanted[:, 0], wanted[:, 1]))  # pairs of one document together
        batch = self.encoder.encode(*decoded, wanted[order])
        scores = np.empty(len(pairs), np.float32)
        scores[order] = self.probabilities(batch)
        return scores

    def probabilities(self, batch: JointBatch) -> Scores:
        """Return the probability of yes, fp32 `[B]`, of encoded pairs."""
        scores: Scores = torch.from_numpy(self.log_odds(batch)).sigmoid().numpy()
        return scores

    def log_odds(self, batch: JointBatch) -> Scores:
        """Return z, fp32 `[B]`, of encoded pairs. The tower reads a medium once, if its pairs are near each other."""
        log_odds = np.empty(len(batch), np.float32)
        features = _FeatureCache(self.model, batch, self.encoder.processor.layout, self.chunk_tokens)
        with torch.inference_mode():
            for pairs in self._windows(batch.sequences):
                shown = features.of(pairs)
                sequences = [batch.sequences.slice(pair, pair + 1) for pair in pairs]
                lengths = np.concatenate([one.lengths for one in sequences])
                for chunk in chunks_of(lengths, self.chunk_tokens, packed=self.model.packs):
                    z_B = self.model(
                        EncodedBatch.concat([sequences[one] for one in chunk]),
                        [medium for one in chunk for medium in shown[one]],
                    )
                    log_odds[[pairs[one] for one in chunk]] = z_B.cpu().numpy()
        return log_odds

    def _windows(self, sequences: EncodedBatch) -> Iterator[range]:
        """Yield runs of pairs with a limited number of tokens."""
        start, num_tokens = 0, 0
        for pair, length in enumerate(sequences.lengths.tolist()):
            num_tokens += length
            if num_tokens >= _CHUNKS_AT_ONCE * self.chunk_tokens:
                yield range(start, pair + 1)
                start, num_tokens = pair + 1, 0
        if start < len(sequences):
            yield range(start, len(sequences))


class _FeatureCache:
    """Features of the media of one batch. The least recently used are dropped when there are too many."""

    def __init__(self, model: ScoringModel, batch: JointBatch, layout: VisionLayout, chunk_tokens: int) -> None:
        self._model, self._batch, self._chunk_tokens = model, batch, chunk_tokens
        self._patches_per_token = layout.merge_patches**2
        self._kept: OrderedDict[MediumKey, MediumFeatures] = OrderedDict()

    def of(self, pairs: range) -> list[list[MediumFeatures]]:
        """Return the features of the visuals of each pair."""
        shown = [self._batch.shown_by([pair]) for pair in pairs]
        needed = dict.fromkeys(key for keys in shown for key in keys)
        self._read([key for key in needed if key not in self._kept])
        for key in needed:
            self._kept.move_to_end(key)
        found = [[self._kept[key] for key in keys] for keys in shown]
        self._drop()
        return found

    def _read(self, keys: list[MediumKey]) -> None:
        """Let the tower read media, those of one size together, as many at a time as a chunk may have tokens."""
        sizes = np.array([self._batch.media[key].grids.prod() for key in keys], np.int32) // self._patches_per_token
        for chunk in chunks_of(sizes, self._chunk_tokens, packed=True):
            some = [keys[one] for one in chunk]
            found = self._model.features([self._batch.media[key] for key in some])
            self._kept.update(zip(some, found, strict=True))

    def _drop(self) -> None:
        kept = sum(len(medium.tokens) for medium in self._kept.values())
        while kept > _FEATURE_CHUNKS * self._chunk_tokens:
            _, dropped = self._kept.popitem(last=False)
            kept -= len(dropped.tokens)


def load_reranker(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    prompt: PairPromptConfig | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    media: MediaConfig | None = None,
    endpoint: str | None = None,
) -> Reranker:
    """Load a re-ranker, or any checkpoint of a supported family with its language-model head.

    The arguments are those of `rzen.load`. `prompt` is how a pair is asked about: by default as the adapter or model
    was trained, and else as Qwen3-VL-Reranker is. Raises `UserError` for anything that is not a checkpoint of a
    supported family, and for one without its head.
    """
    base = Path(checkpoint_folder(os.fspath(path), endpoint))
    tuned = Path(local_folder(os.fspath(adapter), endpoint)) if adapter is not None else None
    if tuned is not None:
        check_base(tuned, base)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        backbone=str(base), dtype=dtype or default_dtype(base, where), gradient_checkpointing=False, tune="full"
    )
    encoder = JointEncoder(str(base), prompt or trained_pair_prompt(base, tuned))
    backbone = load_backbone(str(base), config)
    direction = answer_direction(base, backbone, encoder.answer_ids)
    tuned_backbone = load_adapter(backbone, tuned) if tuned else backbone
    model = ScoringModel(tuned_backbone, encoder.processor.layout, direction)
    return Reranker(encoder, model.requires_grad_(False).eval().to(where), chunk_tokens, media, endpoint)
