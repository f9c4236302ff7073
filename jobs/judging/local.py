"""Pairs scored by a checkpoint: a Ray Data job that decodes on any node and scores in actors with the model.

What is scored together decides the last bits of a score. It depends only on the unit, and on which of its pairs have no
score yet. So any number of actors gives the same bytes, and so does a job that was killed.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jobs.embedding.engine import through_actors
from jobs.embedding.specs import Workers
from jobs.embedding.vectors import VectorCache, write_part
from jobs.judging.inputs import PairPlaces, PairReader, reasons_of
from jobs.judging.pairs import PairUnit
from jobs.judging.specs import ModelJudge
from jobs.runtime.revision import versions
from pipelines.errors import BadMedia
from pipelines.imports import importing_models
from pipelines.samples import DecodedInput, Rejected
from rzen.config import PairPromptConfig
from rzen.model.checkpoints import checkpoint_sha256, stored_dtype, trained_pair_prompt
from rzen.model.locate import checkpoint_folder, local_folder
from rzen.reranking.encoder import EncodedSide, JointBatch, JointEncoder

if TYPE_CHECKING:
    from rzen.reranking.reranker import Reranker

Work = Sequence[tuple[VectorCache, PairUnit]]
"""Units, and where the scores of each are kept."""
Answer = Literal["probability", "log_odds"]
"""What is kept of a pair: the probability of yes, or z, which does not saturate."""


@dataclass(frozen=True)
class LocalJudge:
    """A model that judges. Pickles. `config` has content only: equal ones give equal scores, but for rounding."""

    judge: ModelJudge
    places: PairPlaces
    endpoint: str | None
    chunk_tokens: int
    config: dict[str, Any]
    answer: Answer
    prompt: PairPromptConfig

    @classmethod
    def of(
        cls,
        judge: ModelJudge,
        places: PairPlaces,
        endpoint: str | None,
        chunk_tokens: int,
        answer: Answer = "probability",
    ) -> LocalJudge:
        """Read the files of the model, with the hash of its weights."""
        base = Path(checkpoint_folder(judge.base, endpoint))
        adapter = Path(local_folder(judge.adapter, endpoint)) if judge.adapter else None
        prompt = judge.prompt or trained_pair_prompt(base, adapter)
        encoder = JointEncoder(str(base), prompt)
        _ = encoder.answer_ids  # a tokenizer that has none is an error now, and not in a task
        places = places.for_model(encoder.visual_pixels)
        config = {
            "by": "model",
            "base": checkpoint_sha256(base),
            "adapter": checkpoint_sha256(adapter) if adapter else None,
            "prompt": prompt.model_dump(mode="json"),
            "dtype": judge.dtype or stored_dtype(base),
            "instructions": places.instructions,
            "media": places.media.model_dump(mode="json"),
            "versions": versions(),
        }
        if answer != "probability":  # the configuration of probabilities never named them
            config["answer"] = answer
        return cls(judge, places, endpoint, chunk_tokens, config, answer, prompt)

    @property
    def name(self) -> str:
        """Return what people call the model."""
        return self.judge.adapter or self.judge.base

    def score(self, work: Work, workers: Workers, on_pairs: Callable[[int], None]) -> Counter[str]:
        """Judge units and keep the scores. Return how many pairs have none, by reason. Needs Ray."""
        rows = [{"number": number, "unit": pickle.dumps(unit)} for number, (_, unit) in enumerate(work)]
        stores = [cache.store for cache, _ in work]
        reasons: Counter[str] = Counter()
        for row in through_actors(rows, _prepare, (self,), ScorePairs, (self, stores), workers) if rows else ():
            reasons += Counter(pickle.loads(row["reasons"]))
            on_pairs(int(row["num_pairs"]))
        return reasons


def _prepare(row: dict[str, Any], judge: LocalJudge) -> dict[str, Any]:
    """Decode and encode a unit. Pairs with a bad input are left out, and counted by reason."""
    unit: PairUnit = pickle.loads(row["unit"])
    encoder = _encoder(judge.judge.base, judge.prompt, judge.endpoint)
    queries, documents = (
        [_side(encoder, one) for one in side] for side in _unit_reader(pickle.dumps(judge.places)).read(unit)
    )
    reasons = reasons_of(unit, queries, documents)
    good = np.flatnonzero([not reason for reason in reasons])
    batch: JointBatch | None = None
    if len(good):
        batch = encoder.join(queries, documents, unit.pairs[good])  # type: ignore[arg-type]
    return {
        "number": row["number"],
        "num_pairs": len(unit),
        "keys": [key.decode() for key in unit.keys[good].tolist()],
        "batch": pickle.dumps(batch),
        "reasons": pickle.dumps([reason for reason in reasons if reason]),
    }


def _side(encoder: JointEncoder, given: DecodedInput | Rejected) -> EncodedSide | Rejected:
    if isinstance(given, Rejected):
        return given
    try:
        return encoder.side(given)
    except BadMedia as error:
        return Rejected("", error.reason, error.detail)


@cache
def _encoder(base: str, prompt: PairPromptConfig, endpoint: str | None) -> JointEncoder:
    """Read once in a process."""
    return JointEncoder(checkpoint_folder(base, endpoint), prompt)


_unit_readers: dict[bytes, PairReader] = {}


def _unit_reader(places: bytes) -> PairReader:
    """Return one in a process, with its manifests and indices."""
    if places not in _unit_readers:
        _unit_readers.clear()
        _unit_readers[places] = pickle.loads(places).reader()
    return _unit_readers[places]


class ScorePairs:
    """An actor that holds the model, scores units and keeps their scores."""

    def __init__(self, judge: LocalJudge, stores: Sequence[Any]) -> None:
        self._stores, self._answer = stores, judge.answer
        self._reranker = _load(judge)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return how many pairs there were, and why some have no score."""
        batch: JointBatch | None = pickle.loads(row["batch"])
        if batch is not None:
            score = self._reranker.log_odds if self._answer == "log_odds" else self._reranker.probabilities
            scores = score(batch)
            write_part(self._stores[int(row["number"])], list(row["keys"]), scores[:, None])
        return {"num_pairs": row["num_pairs"], "reasons": row["reasons"]}


def _load(judge: LocalJudge) -> Reranker:
    with importing_models():
        from rzen.reranking.reranker import load_reranker  # torch is for the actors, not for the tasks that decode

    model = judge.judge
    return load_reranker(
        model.base,
        model.adapter,
        prompt=judge.prompt,
        dtype=model.dtype,
        chunk_tokens=judge.chunk_tokens,
        endpoint=judge.endpoint,
    )
