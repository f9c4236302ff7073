"""Queries and documents to token sequences of pairs, and to media that are each there once.

Workers that decode media import this module, so that it must be quick to import: no torch, no transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.samples import DecodedInput, Visual
from rzen.config import PairPromptConfig, PromptConfig
from rzen.inputs.processor import EncodedBatch, Processor, VisionInput
from rzen.inputs.prompts import IM_END, IM_START, Piece, vision_pieces
from rzen.reranking.prompts import PAIR_TEMPLATES, Part

MediumKey = bytes
"""Digest of a medium's patches: equal for media that are equal to the vision tower."""


@dataclass(frozen=True)
class JointBatch:
    """Pairs of a query and a document, each as one joint sequence, ready for the model."""

    sequences: EncodedBatch
    """One sequence for each pair, without the patches of its visuals."""
    shown: tuple[MediumKey, ...]
    """Medium of each visual of the sequences, in the order of their tokens."""
    media: dict[MediumKey, EncodedBatch]
    """Each medium once, as an input without tokens."""

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def concat(cls, batches: Sequence[JointBatch]) -> JointBatch:
        """Return all pairs in order, with each medium once. At least one batch is needed."""
        media: dict[MediumKey, EncodedBatch] = {}
        for batch in batches:
            media |= batch.media
        sequences = EncodedBatch.concat([batch.sequences for batch in batches])
        return cls(sequences, tuple(key for batch in batches for key in batch.shown), media)

    def take(self, pairs: Sequence[int] | npt.NDArray[np.int64]) -> JointBatch:
        """Return some pairs, at least one, with the media that they show."""
        shown = self.shown_by(pairs)
        sequences = EncodedBatch.concat([self.sequences.slice(int(pair), int(pair) + 1) for pair in pairs])
        return JointBatch(sequences, shown, {key: self.media[key] for key in shown})

    def shown_by(self, pairs: Sequence[int] | npt.NDArray[np.int64]) -> tuple[MediumKey, ...]:
        """Return the medium of each visual of some pairs."""
        ends, counts = self._visual_ends, self.sequences.visual_counts
        return tuple(key for pair in pairs for key in self.shown[ends[pair] - counts[pair] : ends[pair]])

    @cached_property
    def _visual_ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.sequences.visual_counts)


@dataclass(frozen=True)
class EncodedSide:
    """A query or a document: its text cut, its visuals in patches, and the same as inputs without tokens."""

    given: DecodedInput
    visuals: tuple[VisionInput, ...]
    media: tuple[EncodedBatch, ...]
    keys: tuple[MediumKey, ...]


class JointEncoder:
    """Encodes pairs for one checkpoint and prompt. Pickles without the files of the checkpoint."""

    def __init__(self, model_dir: str, prompt: PairPromptConfig) -> None:
        self.prompt = prompt
        budget = {name: getattr(prompt, name) for name in ("max_text_tokens", "min_visual_tokens", "max_visual_tokens")}
        self.processor = Processor(model_dir, PromptConfig(template="plain", **budget))

    @property
    def visual_pixels(self) -> int:
        """Pixels of an image or page that the model takes in at most."""
        return self.processor.visual_pixels

    @cached_property
    def answer_ids(self) -> tuple[int, int]:
        """Return the tokens of yes and of no: the first one of each, if a tokenizer needs several.

        Raises `UserError` where both begin with the same token.
        """
        template = PAIR_TEMPLATES[self.prompt.template]
        yes, no = (self.processor.text_ids(answer)[0] for answer in (template.yes, template.no))
        if yes == no:
            problem = f"writes {template.yes!r} and {template.no!r} with the same first token"
            raise UserError(self.processor.model_dir, problem, "name a checkpoint with a tokenizer of Qwen")
        return yes, no

    def encode(
        self, queries: Sequence[DecodedInput], documents: Sequence[DecodedInput], pairs: npt.NDArray[np.int64]
    ) -> JointBatch:
        """Return the sequences of pairs `[B, 2]`, at least one: number of the query, number of the document.

        Raises `BadMedia` for a shape that the backbone cannot take.
        """
        return self.join([self.side(query) for query in queries], [self.side(one) for one in documents], pairs)

    def side(self, given: DecodedInput) -> EncodedSide:
        """Return what is done once for a query or a document. Raises `BadMedia` as `encode` does."""
        visuals = self.processor.vision_inputs(given.visuals)
        media = tuple(self.processor.pack([], [], [visual]) for visual in visuals)
        cut = replace(given, text=self.processor.cut(given.text, self.prompt.max_text_tokens))
        return EncodedSide(cut, tuple(visuals), media, tuple(_key(medium) for medium in media))

    def join(
        self, queries: Sequence[EncodedSide], documents: Sequence[EncodedSide], pairs: npt.NDArray[np.int64]
    ) -> JointBatch:
        """Return what `encode` does, of sides."""
        sequences: list[EncodedBatch] = []
        shown: list[MediumKey] = []
        media: dict[MediumKey, EncodedBatch] = {}
        for query, document in pairs.tolist():
            sides = (queries[query], documents[document])
            sequences.append(self._sequence(*sides))
            for side in sides:
                shown += side.keys
                media |= zip(side.keys, side.media, strict=True)
        return JointBatch(EncodedBatch.concat(sequences), tuple(shown), media)

    def _sequence(self, query: EncodedSide, document: EncodedSide) -> EncodedBatch:
        parts = PAIR_TEMPLATES[self.prompt.template].parts(query.given, document.given)
        visuals = [*query.visuals, *document.visuals]
        ids = self._ids(parts, visuals)
        return self.processor.pack(ids, [False] * len(ids), visuals).without_patches()

    def _ids(self, parts: Sequence[Part], visuals: Sequence[VisionInput]) -> list[int]:
        """Return the tokens of a question. A stretch without special tokens is tokenized as a whole, as in the library.

        `visuals` are those of the parts, in patches.
        """
        system = PAIR_TEMPLATES[self.prompt.template].system
        start = [Piece("fixed", f"system\n{system}"), Piece("special", IM_END), Piece("fixed", "\n")]
        pieces = [Piece("special", IM_START), *start, Piece("special", IM_START), Piece("fixed", "user\n")]
        left = iter(visuals)
        for part in parts:
            if isinstance(part, Visual):
                pieces += [piece for span in self.processor.spans(next(left)) for piece in vision_pieces(span)]
            else:
                pieces.append(Piece("text", part))
        pieces += [Piece("special", IM_END), Piece("fixed", "\n"), Piece("special", IM_START)]
        pieces.append(Piece("fixed", "assistant\n"))
        ids: list[int] = []
        stretch = ""
        for piece in pieces:
            if piece.kind == "special":
                ids += self.processor.text_ids(stretch)
                ids += [self.processor.special_id(piece.text)] * piece.count
                stretch = ""
            else:
                stretch += piece.text
        return ids + self.processor.text_ids(stretch)


def _key(medium: EncodedBatch) -> MediumKey:
    digest = hashlib.blake2b(medium.patches.tobytes(), digest_size=16)
    digest.update(medium.grids.tobytes() + medium.grid_kinds.tobytes() + medium.patch_frames.tobytes())
    return digest.digest()
