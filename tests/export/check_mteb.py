"""An export in mteb: a tiny retrieval task in memory, texts for images, scored by mteb and by rzen.

    python -m tests.export.check_mteb OUT

needs mteb 2, rzen and what it needs, and the folder that `make.py` has written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.models.models_protocols import EncoderProtocol
from PIL import Image

from pipelines.samples import DecodedInput
from pipelines.samples import Visual as DecodedVisual
from rzen.evaluation.metrics import metrics_by_query
from rzen.export.mteb import load
from tests.export.inputs import INSTRUCTION, noise
from tests.export.report import report
from tests.ranks import rank_of_gold, relevant_of

NUM = 12
TEXTS = [f"caption number {number} of {NUM}" for number in range(NUM)]
IMAGES = [noise("image", 1, 40 + 9 * number, 90 - 3 * number, number).pixels for number in range(NUM)]
NOTES = """\
mteb's score of an exported tiny model on {num} texts for {num} images of noise, less the score of rzen's own encoder
and metrics on the same: {scores}.
mteb rounds to five digits. The encoder passes `isinstance(encoder, mteb.EncoderProtocol)`."""


class TextsForImages(AbsTaskRetrieval):
    """Text i is answered by image i."""

    metadata = mteb.TaskMetadata(
        name="TextsForImages",
        description="Captions for images of noise",
        dataset={"path": "in/memory", "revision": "1"},
        type="Any2AnyRetrieval",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt={"query": INSTRUCTION},
    )

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is downloaded."""
        ids = [str(number) for number in range(NUM)]
        images = [Image.fromarray(pixels[0]) for pixels in IMAGES]
        split = {
            "queries": Dataset.from_dict({"id": ids, "text": TEXTS}),
            "corpus": Dataset.from_dict({"id": ids, "image": images}),
            "relevant_docs": {number: {number: 1} for number in ids},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def main(out: Path) -> None:
    """Writes the result beside this file."""
    encoder = load(str(out / "qwen2_vl"))
    assert isinstance(encoder, EncoderProtocol)
    result = mteb.evaluate(encoder, TextsForImages(), cache=None, encode_kwargs={"batch_size": 5})
    scores = result.task_results[0].scores["test"][0]

    queries = [DecodedInput(text=text, instruction=INSTRUCTION) for text in TEXTS]
    targets = [DecodedInput(visuals=(DecodedVisual("image", pixels),)) for pixels in IMAGES]
    vectors = [encoder._embedder.embed(inputs) for inputs in (queries, targets)]
    ranks = rank_of_gold(*vectors, np.arange(NUM))
    found = metrics_by_query(relevant_of(np.arange(NUM)[:, None]), ranks)
    theirs = {"ndcg_at_10": "ndcg_linear@10", "hit_rate_at_1": "hit@1", "hit_rate_at_5": "hit@5"}
    own = {name: float(found[metric].mean()) for name, metric in theirs.items()}
    differences: dict[str, float | str] = {name: abs(scores[name] - value) for name, value in own.items()}
    notes = NOTES.format(num=NUM, scores=", ".join(f"{name} {value:.5f}" for name, value in own.items()))
    text = report("An export in mteb", ("torch", "transformers", "mteb"), {"mteb - rzen": differences}, notes)
    print(text)
    Path(__file__).with_name("mteb.md").write_text(text.replace("| side |", "| score |"))
    if max(float(value) for value in differences.values()) > 1e-5:
        sys.exit("more than 1e-5")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
