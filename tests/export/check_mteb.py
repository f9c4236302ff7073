"""An export in mteb: a tiny retrieval task in memory, texts for images, scored by mteb and by rzen.

Then mteb's own mock tasks, its cache of scores, and the instructions of its tasks.

    python -m tests.export.check_mteb OUT

needs mteb 2, rzen and what it needs, and the folder that `make.py` has written.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mteb
import mteb.mocks.mock_tasks as mock_tasks
import numpy as np
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.cache import ResultCache
from mteb.models.models_protocols import EncoderProtocol
from PIL import Image

from pipelines.samples import DecodedInput
from pipelines.samples import Visual as DecodedVisual
from rzen.evaluation.metrics import metrics_by_query
from rzen.export.mteb import _prompt_of_kind, instruction_of, load
from tests.export.inputs import INSTRUCTION, noise
from tests.export.report import report
from tests.ranks import rank_of_gold, relevant_of

NUM = 12
TEXTS = [f"caption number {number} of {NUM}" for number in range(NUM)]
IMAGES = [noise("image", 1, 40 + 9 * number, 90 - 3 * number, number).pixels for number in range(NUM)]
NOTES = """\
mteb's score of an exported tiny model on {num} texts for {num} images of noise, less the score of rzen's own encoder
and metrics on the same: {scores}.
mteb rounds to five digits. The encoder passes `isinstance(encoder, mteb.EncoderProtocol)`.

* {passed} of mteb's {mocks} mock tasks without sound run, {videos} of them with videos; torchcodec is {torchcodec}.
* {bare} of {tasks} tasks without sound have no prompt. {instructed} of these get that of their kind.
* Another model in a folder of the same name is scored again, with {calls} calls of `encode`. The same model is not."""


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


def mocks() -> list[Any]:
    """mteb's mock tasks without sound."""
    found = []
    for name in sorted(dir(mock_tasks)):
        kind = getattr(mock_tasks, name)
        if name.startswith("Mock") and isinstance(kind, type) and "audio" not in kind.metadata.modalities:
            found.append(kind())
    return found


def runs(encoder: Any, task: Any) -> bool:
    """Whether a task ends with a score; prints why not."""
    try:
        mteb.evaluate(encoder, task, cache=None, encode_kwargs={"batch_size": 4}, show_progress_bar=False)
    except Exception as error:
        print(f"{task.metadata.name}: {type(error).__name__}: {error}")
        return False
    return True


def calls_of(folder: Path, cache: ResultCache) -> int:
    """How often `encode` is called to score the model of a folder."""
    encoder = load(str(folder))
    calls = []
    encode = encoder.encode
    encoder.encode = lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs)  # type: ignore[method-assign, assignment, func-returns-value]
    mteb.evaluate(encoder, TextsForImages(), cache=cache, encode_kwargs={"batch_size": 5}, show_progress_bar=False)
    return len(calls)


def calls_by_model(out: Path) -> list[int]:
    """Calls for one model, for the same again, and for another one in its place."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch, "model"), ResultCache(Path(scratch, "cache"))
        shutil.copytree(out / "qwen2_vl", folder)
        calls = [calls_of(folder, cache), calls_of(folder, cache)]
        shutil.rmtree(folder)
        shutil.copytree(out / "rzen_release", folder)
        return [*calls, calls_of(folder, cache)]


def instructions() -> tuple[int, int, int]:
    """Tasks without sound, those of them without a prompt, and those of these that get an instruction."""
    tasks = [task for task in mteb.get_tasks() if "audio" not in task.metadata.modalities]
    bare = [task.metadata for task in tasks if not task.metadata.prompt]
    instructed = [one for one in bare if instruction_of(one, "query", {}, _prompt_of_kind)]
    return len(tasks), len(bare), len(instructed)


def main(out: Path) -> None:
    """Writes the result beside this file."""
    encoder = load(str(out / "qwen2_vl"))
    assert isinstance(encoder, EncoderProtocol)
    result = mteb.evaluate(encoder, TextsForImages(), cache=None, encode_kwargs={"batch_size": 5})
    scores = result.task_results[0].scores["test"][0]

    queries = [DecodedInput(text=text, instruction=INSTRUCTION) for text in TEXTS]
    targets = [DecodedInput(visuals=(DecodedVisual("image", pixels),)) for pixels in IMAGES]
    vectors = [encoder._embedder.encode(inputs) for inputs in (queries, targets)]
    ranks = rank_of_gold(*vectors, np.arange(NUM))
    found = metrics_by_query(relevant_of(np.arange(NUM)[:, None]), ranks)
    theirs = {"ndcg_at_10": "ndcg_linear@10", "hit_rate_at_1": "hit@1", "hit_rate_at_5": "hit@5"}
    own = {name: float(found[metric].mean()) for name, metric in theirs.items()}
    differences: dict[str, float | str] = {name: abs(scores[name] - value) for name, value in own.items()}
    tasks = mocks()
    passed = [task.metadata.modalities for task in tasks if runs(encoder, task)]
    once, again, other = calls_by_model(out)
    num_tasks, num_bare, num_instructed = instructions()
    notes = NOTES.format(
        num=NUM,
        scores=", ".join(f"{name} {value:.5f}" for name, value in own.items()),
        passed=len(passed),
        mocks=len(tasks),
        videos=sum("video" in modalities for modalities in passed),
        torchcodec="installed" if importlib.util.find_spec("torchcodec") else "not installed",
        tasks=num_tasks,
        bare=num_bare,
        instructed=num_instructed,
        calls=other,
    )
    text = report("An export in mteb", ("torch", "transformers", "mteb"), {"mteb - rzen": differences}, notes)
    print(text)
    Path(__file__).with_name("mteb.md").write_text(text.replace("| side |", "| score |"))
    if max(float(value) for value in differences.values()) > 1e-5:
        sys.exit("more than 1e-5")
    if len(passed) < len(tasks) or again or not once or other != once or num_instructed < 0.9 * num_bare:
        sys.exit(f"{len(passed)} of {len(tasks)} tasks, {once}, {again}, {other} calls, {num_instructed} instructions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
