"""Job of kind `finetunes`: fine-tunes side by side, then their soup."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from jobs.load import Document, check, read_document
from jobs.models import local_folder, publish_folder
from jobs.progress import say
from jobs.spec import AblationSpec, FinetunesSpec, Spec, TrainSpec
from pipelines.errors import UserError
from pipelines.storage import open_store


def resolve(spec: FinetunesSpec, document: Document) -> dict[str, TrainSpec]:
    """The spec of each fine-tune; `document` is what `spec` was read from."""
    stage = stage_document(spec, document)
    specs: dict[str, TrainSpec] = {}
    for name, changes in spec.runs.items():
        place = document.place_under("runs", name)
        run_document = stage.overlaid({"name": name}, place).overlaid(changes, place)
        train = check_train(run_document)
        if train.model.tune != "lora":
            where = run_document.place(("model", "tune"))
            raise UserError(where, "model.tune: full has no adapters to soup", "set model.tune: lora")
        specs[name] = train
    return specs


def stage_document(spec: FinetunesSpec | AblationSpec, document: Document) -> Document:
    """What all runs start from: the stage with the changes for all of them."""
    return read_document(spec.stage, document.folder).overlaid(spec.set, document.place_under("set"))


def check_train(document: Document) -> TrainSpec:
    """The spec of one run. Raises `UserError` if it is of another kind."""
    train = check(document)
    if not isinstance(train, TrainSpec):
        raise UserError(document.place(("kind",)), f"kind={train.kind!r} does not train", "use kind: train")
    return train


def named(spec: FinetunesSpec, document: Document) -> list[Spec]:
    """The specs of its runs."""
    return [*resolve(spec, document).values()]


def run(spec: FinetunesSpec, document: Document) -> dict[str, Any]:
    """Trains all, then writes the adapter that is their exact weighted mean."""
    from jobs.train import result_url, run_all
    from rzen.config import MeanSoup
    from rzen.soup.make import make_soup

    specs = resolve(spec, document)
    run_all(list(specs.values()), spec.max_parallel)
    weights = spec.soup or dict.fromkeys(specs, 1.0)
    adapters = {name: Path(local_folder(result_url(specs[name]), specs[name].run.endpoint)) for name in weights}
    with tempfile.TemporaryDirectory(prefix="rzen-soup-") as scratch:
        lineage = make_soup(adapters, Path(scratch, "adapter"), MeanSoup(weights=weights))
        publish_folder(Path(scratch, "adapter"), open_store(spec.out, spec.endpoint))
    shares = ", ".join(f"{weight / sum(weights.values()):.3f} {name}" for name, weight in weights.items())
    say(f"  soup of {shares}, exact, rank {lineage['rank']}: {spec.out}")
    return {"outputs": [spec.out, *map(result_url, specs.values())]}
