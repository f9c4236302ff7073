"""Commands of `rzen registry`: the models of scheduled retraining, and which one is the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import AsJson, print_json, print_yaml
from jobs.commands.output import print_text
from jobs.spec.load import read_document
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.workflows.registry import Champion, Registry

RETRAIN_SPEC = "jobs/retrain.yaml"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="id of a model")]
ModelOrChampion = Annotated[str | None, typer.Argument(metavar="MODEL", help="id of a model (default: the champion)")]
Reason = Annotated[str, typer.Option(help="reason, kept in the history")]


def choose(
    context: typer.Context,
    registry: Annotated[
        str | None, typer.Option(help="directory or s3:// URL (default: that of jobs/retrain.yaml)")
    ] = None,
) -> None:
    """List, compare, promote the models of retraining.

    `kind: retrain` publishes the models. Promotions are never deleted: a rollback promotes the model before again.
    """
    context.obj = registry


def _open(context: typer.Context) -> Registry:
    from jobs.workflows.registry import Registry
    from pipelines.storage.location import open_store

    return Registry(open_store(context.obj or read_document(RETRAIN_SPEC).data["registry"]))


def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List models, promotions and retraining runs."""
    registry = _open(context)
    champion = registry.champion()
    lineages = {model: registry.lineage(model) for model in registry.models()}
    promotions, retrainings = registry.promotions(), registry.retrainings()
    if as_json:
        newest = champion.model if champion else None
        print_json(
            {"champion": newest, "models": lineages, "promotions": promotions, "retrainings": retrainings},
        )
        return
    for model, lineage in lineages.items():
        samples = sum(lineage.get("data", {}).get("samples", {}).values())
        mark = "*" if champion and champion.model == model else " "
        verdict = lineage.get("verdict", {})
        reasons = f"{'passed' if verdict['promote'] else 'refused'}: {'; '.join(verdict['reasons'])}" if verdict else ""
        print_text(f"{mark} {model}  {lineage['at'][:19]}  {samples:,} samples  {reasons}")
    for promotion in promotions:
        replaced = f" instead of {promotion['previous']}" if promotion["previous"] else ""
        text = f"{promotion['model']}{replaced}: {promotion['reason']} ({promotion['by']})"
        print_text(f"promotion {promotion['generation']}  {promotion['at'][:19]}  {text}")
        if pair := promotion.get("pair"):
            print_text(f"    servers load {pair['model']} with {pair['corpus']}, version {pair['corpus_version']}")
    for retraining in retrainings:
        print_text(f"retraining {retraining['id']}  {retraining['at'][:19]}  {retraining['outcome']}")
    if champion is None:
        print_text(f"{registry.store.url}: no champion yet")


def show(context: typer.Context, model: ModelOrChampion = None, as_json: AsJson = False) -> None:
    """Print the lineage of a model: data, settings, parents, scores and verdict. As YAML, or as JSON for scripts."""
    registry = _open(context)
    lineage = registry.lineage(model or _champion(registry).model)
    if as_json:
        print_json(lineage)
    else:
        print_yaml(lineage)


def diff(context: typer.Context, model: Model, other: ModelOrChampion = None, as_json: AsJson = False) -> None:
    """Print how the lineages of two models differ."""
    from jobs.runtime.records import differences

    registry = _open(context)
    changes = differences(registry.lineage(other or _champion(registry).model), registry.lineage(model))
    if as_json:
        print_json(changes)
        return
    for change in changes:
        print_text(change)


def promote(context: typer.Context, model: Model, reason: Reason, as_json: AsJson = False) -> None:
    """Make a model the champion, whatever the gate decided.

    Servers that follow the registry load it with the live version of its corpus, if retraining embedded one.
    """
    registry = _open(context)
    champion = registry.champion()
    promoted = registry.promote(model, reason=reason, instead_of=champion, pair=registry.pair(model))
    _print_promoted(promoted, as_json)


def rollback(context: typer.Context, reason: Reason, as_json: AsJson = False) -> None:
    """Promote the champion before the present one again, and the corpus that it had."""
    _print_promoted(_open(context).rollback(reason), as_json)


def _print_promoted(promoted: Champion, as_json: bool) -> None:
    if as_json:
        print_json({"generation": promoted.generation, "model": promoted.model})
    else:
        print_text(f"promotion {promoted.generation}: {promoted.model}")


def _champion(registry: Registry) -> Champion:
    champion = registry.champion()
    if champion is None:
        raise UserError(registry.store.url, "has no champion yet", "name a model, or run jobs/retrain.yaml first")
    return champion
