"""Job of kind `check`: an export in sentence-transformers, which knows nothing of rzen, against rzen's own vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.runtime.lease import hold_output
from jobs.runtime.progress import say
from jobs.runtime.records import as_json
from jobs.serving.specs import CheckSpec
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedInput, Rejected
from pipelines.storage.location import open_store
from rzen.embedding.embedder import load
from rzen.export.opening import encode_decoded, has_torchvision, open_in_sentence_transformers
from rzen.model.locate import local_folder

KIND, COMPARISON = "check", "comparison.json"


def run(spec: CheckSpec) -> dict[str, Any]:
    """Write the largest difference for each kind of input. Raises `UserError` for one above the tolerance."""
    store = open_store(spec.out, spec.endpoint)
    with hold_output(store, KIND, "checks") as lease:
        differences = _compare(spec)
        lease.check()
        store.write(COMPARISON, as_json(differences))
    worst = max(differences, key=differences.__getitem__)
    if not differences[worst] <= spec.tolerance:
        problem = f"sentence-transformers gives vectors of {worst} that differ by {differences[worst]:.1e} from rzen's"
        raise UserError(spec.model, problem, f"export it again in float32, or raise tolerance={spec.tolerance}")
    return {"outputs": [spec.out], "differences": differences}


def _compare(spec: CheckSpec) -> dict[str, float]:
    """Print and return kind of input -> largest difference."""
    folder = local_folder(spec.model, spec.endpoint)
    embedder = load(folder, dtype="float32", endpoint=spec.endpoint)
    data = spec.data.model_copy(update={"media": spec.data.media.for_model(embedder.processor.visual_pixels)})
    by_kind: dict[str, list[DecodedInput]] = defaultdict(list)
    for given in _inputs(data, spec.num_samples):
        by_kind[_kind(given)].append(given)
    videos = 0 if has_torchvision() else sum(len(by_kind.pop(kind)) for kind in [*by_kind] if "video" in kind)
    if not by_kind:
        raise UserError(data.root, "has no text or image to compare", "name other data, or install torchvision")
    model = open_in_sentence_transformers(folder, device="cpu").float()
    differences = {}
    for kind, inputs in sorted(by_kind.items()):
        differences[kind] = float(np.abs(encode_decoded(model, inputs) - embedder.encode(inputs)).max())
        say(f"  {kind}: {len(inputs)} inputs differ by at most {differences[kind]:.1e}")
    if videos:
        say(f"  {videos} videos are left out: sentence-transformers needs torchvision for them", "yellow")
    return differences


def _inputs(data: DataConfig, num_samples: int) -> Iterator[DecodedInput]:
    """Yield the queries and targets of the first samples of each source."""
    reader = Reader(data)
    for source, size in reader.sizes().items():
        rows = [(index, role) for index in range(min(size, num_samples)) for role in ("query", "positive")]
        for given in reader.inputs(source, rows):  # type: ignore[arg-type]
            if not isinstance(given, Rejected):
                yield given


def _kind(given: DecodedInput) -> str:
    """Return a name such as `image + text`."""
    kinds = sorted({"page" if visual.kind == "document" else visual.kind for visual in given.visuals})
    return " + ".join([*kinds, *(["text"] if given.text else [])])
