"""Job of kind `export`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from jobs.runtime.lease import Lease, hold_version
from jobs.runtime.progress import say
from jobs.runtime.revision import revision, versions
from jobs.serving.specs import ExportSpec
from jobs.training.runs import LATEST, SPEC
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.publish import publish_folder
from pipelines.storage.store import Store, disk_errors
from pipelines.stored_json import parse_json, read_json, stored_file
from rzen.model.locate import checkpoint_folder, local_folder


@stored_file
class _Media(TypedDict):
    frames: int


@stored_file
class _Data(TypedDict):
    media: _Media


@stored_file
class _Objective(TypedDict):
    matryoshka: NotRequired[list[int]]


@stored_file
class _Spec(TypedDict):
    global_batch: int
    data: _Data
    objective: NotRequired[_Objective]


@stored_file
class _Facts(TypedDict):
    data: NotRequired[dict[str, str]]
    steps: NotRequired[int]


@stored_file
class RecipeFile(TypedDict):
    """What a model card repeats from the `spec.json` of a run."""

    spec: _Spec
    data: _Facts
    revision: NotRequired[str]


FRAMES = 8  # as the released script of RzenEmbed
SOUP = "soup.json"


def run(spec: ExportSpec) -> dict[str, Any]:
    """Write the model. What was there before stays until the new one is whole."""
    base = Path(checkpoint_folder(spec.model.base, spec.endpoint))  # before anything is made
    adapter = Path(local_folder(spec.model.adapter, spec.endpoint)) if spec.model.adapter else None
    out = open_store(spec.out, spec.endpoint)
    with hold_version(out, "exports") as lease:
        _export(spec, base, adapter, out, lease)
    return {"outputs": [spec.out]}


def _export(spec: ExportSpec, base: Path, adapter: Path | None, out: Store, lease: Lease) -> None:
    from rzen.export.card_metadata import ModelCardData
    from rzen.export.export import ExportOptions, export_model
    from rzen.export.reranker import export_reranker
    from rzen.model.checkpoints import read_identity, read_pair_prompt

    scores = _scores(spec, base, adapter)
    soup = _soup(adapter or base)
    weights = {parent["place"]: parent["coefficient"] for parent in soup.get("parents", [])}
    recipes = _recipes(spec, list(weights))
    facts = ModelCardData(
        title=Path(spec.out).name,
        base=spec.model.base,
        adapter=spec.model.adapter,
        recipes=recipes,
        weights={_run_name(url): weight for url, weight in weights.items()},
        method=soup["settings"]["method"] if soup else None,
        scores=scores,
        license=spec.license,
        languages=spec.languages,
        datasets=spec.datasets,
        versions=versions() | {"revision": revision()},
    )
    dimensions = tuple(spec.dimensions if spec.dimensions is not None else trained_dimensions(recipes, weights))
    options = ExportOptions(
        spec.format, spec.dtype, spec.frames or _frames(recipes), dict(spec.instructions), dimensions, facts
    )
    unsupported_reason = None
    with disk_errors(tempfile.gettempdir()), tempfile.TemporaryDirectory(prefix="rzen-export-") as folder:
        local = Path(folder, "model")
        if spec.format == "reranker":
            pair_prompt = (adapter and read_pair_prompt(adapter)) or read_pair_prompt(base) or spec.pair_prompt
            export_reranker(str(base), adapter, local, pair_prompt, options)
            template: str = pair_prompt.template
        else:
            identity = read_identity(adapter or base, spec.identity)
            unsupported_reason = export_model(str(base), adapter, local, identity, options)
            template = identity.prompt.template
        lease.check()
        publish_folder(local, out)
    say(f"  {spec.out}: {_TARGETS[spec.format]} ({spec.dtype}), prompt {template}")
    if spec.format == "model":
        say(
            f"    no files for sentence-transformers and vLLM: {unsupported_reason}; rzen and mteb read it as trained"
            if unsupported_reason
            else "    and for sentence-transformers, vLLM and mteb",
            "yellow" if unsupported_reason else "dim",
        )


_TARGETS = {
    "model": "a checkpoint for AutoModel",
    "adapter": "an adapter for PEFT",
    "rzen_release": "a checkpoint for the released script",
    "reranker": "a re-ranker for transformers, sentence-transformers and vLLM",
}


def _soup(folder: Path) -> dict[str, Any]:
    """The lineage of a soup; nothing for what is none."""
    from rzen.soup.make import SoupFile

    return {**read_json(folder / SOUP, SoupFile)} if (folder / SOUP).is_file() else {}


def _recipes(spec: ExportSpec, parents: list[str]) -> dict[str, Any]:
    """`spec.json` of the runs that have made base and adapters, where it lies in the folder above theirs."""
    recipes = {}
    for url in (spec.model.base, *([spec.model.adapter] if spec.model.adapter else []), *parents):
        above, _, _ = url.rstrip("/").rpartition("/")
        store = open_store(above, spec.endpoint) if above else None
        if store and store.exists(SPEC) and not store.exists(LATEST):  # else it replaces the run of the result
            place = f"{store.url}/{SPEC}"
            recipes[_run_name(url)] = parse_json(store.read(SPEC), place, RecipeFile, "restore or move it")
    return recipes


def _run_name(url: str) -> str:
    return url.rstrip("/").split("/")[-2] if "/" in url.rstrip("/") else url


def _frames(recipes: dict[str, Any]) -> int:
    """Most of any run, made even."""
    frames = [recipe["spec"]["data"]["media"]["frames"] for recipe in recipes.values()]
    return (max(frames, default=FRAMES) + 1) // 2 * 2


def trained_dimensions(recipes: Mapping[str, Any], parents: Iterable[str]) -> list[int]:
    """Return the smaller widths of the last training: of all parents of a soup, else of the last run that is known."""
    names = [_run_name(url) for url in parents] or list(recipes)[-1:]
    trained = [set(recipes[name]["spec"].get("objective", {}).get("matryoshka", [])) if name in recipes else set()
               for name in names]  # fmt: skip
    return sorted(set.intersection(*trained)) if trained else []


def _scores(spec: ExportSpec, base: Path, adapter: Path | None) -> dict[str, Any]:
    """Of an evaluation, the rows of the model that is exported, which has the weights that were scored."""
    from rzen.evaluation.results import ResultsFile
    from rzen.model.checkpoints import checkpoint_sha256

    if spec.scores is None:
        return {}
    path = Path(spec.scores)
    if not path.is_file():
        raise UserError(f"scores {path}", "does not exist", "evaluate the model first, or set scores: null")
    results = read_json(path, ResultsFile, "evaluate again, or set scores: null")
    settings, reranked = results["settings"], results.get("rerank", {})
    exported = [checkpoint_sha256(base), checkpoint_sha256(adapter) if adapter else None]
    if spec.format == "reranker":
        tables = {f"{model}, {task}": one for model, some in reranked.items() for task, one in some.items()}
        if settings.get("reranker") != exported or not tables:
            raise _no_scores(spec, path, "evaluate with `rerank`")
        return {"rows": [], "settings": settings, "rerank": tables}
    scored = settings.get("weights")
    if isinstance(scored, dict):
        mine = {name for name, weights in scored.items() if weights == exported}
    else:  # of an evaluation that did not record them: by name
        scored, mine = _named_alike(spec, settings, path)
    rows = [asdict(row) for row in results["rows"] if row.model in mine]
    if not rows:
        raise _no_scores(spec, path, f"it has {', '.join(scored)}: evaluate this one")
    own = next((some for name, some in reranked.items() if name in mine), {})
    return {"rows": rows, "settings": settings, "rerank": own}


def _no_scores(spec: ExportSpec, path: Path, fix: str) -> UserError:
    problem = f"has no score of the weights of base {spec.model.base} with adapter {spec.model.adapter}"
    return UserError(f"scores {path}", problem, f"{fix}, or set scores: null")


def _named_alike(spec: ExportSpec, settings: dict[str, Any], path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the models of an evaluation, and the names of those that have base and adapter of the export."""
    try:
        models: dict[str, Any] = settings["spec"]["models"]
        wanted = (spec.model.base, spec.model.adapter)
        return models, {name for name, ref in models.items() if (ref["base"], ref["adapter"]) == wanted}
    except (KeyError, TypeError, AttributeError) as error:
        problem = "has neither settings.weights nor settings.spec.models"
        raise UserError(f"scores {path}", problem, "evaluate again, or set scores: null") from error
