"""Command `plan`: what a job will need, before anything runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import AsJson, Changes, SpecPath, print_json, print_warnings, read_spec
from jobs.commands.output import print_error, print_text
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.training.forecast import RunForecast
    from jobs.workflows.forecast import JobForecast

_GIB = 2**30
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "loss": "vectors and scores of the loss",
    "update": "or, later, the optimizer's step",
    "buffers": "buffers of communication",
}
_TITLE_WIDTH = max(map(len, _PARTS.values()))


def plan(
    spec: SpecPath,
    samples_per_s: Annotated[
        float | None, typer.Option(help="pairs of all workers per second, for the hours", min=1e-9, show_default=False)
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="RUN", help="folder of a run whose measured rate gives the hours")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            help="memory of a GPU in GiB (default: cluster.memory_gib); more than that is a mistake", show_default=False
        ),
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job will need: steps, epochs, memory of a worker, hours, and what is wrong or missing.

    Needs neither Ray nor a GPU. Exits with 1 if there is a mistake.
    """
    from jobs.training.forecast import Rate, measured_rate
    from jobs.workflows.forecast import forecast

    if samples_per_s and like:
        raise UserError("--like", "contradicts --samples-per-s", "give one of them")
    checked, document = read_spec(spec, changes)
    rate = measured_rate(like) if like else Rate(samples_per_s) if samples_per_s else None
    limit_bytes = None if memory_gib is None else round(memory_gib * _GIB)
    found = forecast(checked, document, rate, limit_bytes)
    mistakes = [*found.mistakes, *(text for run in found.runs for text in run.mistakes)]
    if as_json:
        print_json(asdict(found) | {"hours": _hours(found)})
    else:
        print_warnings(checked, [], document)
        for run in found.runs:
            _print_run(run)
        if len(found.runs) > 1 and (hours := _hours(found)) is not None:
            print_text(f"all {len(found.runs)} runs, one after the other: {hours:.1f} hours")
        if to_come := {*found.to_come, *(place for run in found.runs for place in run.to_come.values())}:
            print_text(f"made by earlier jobs, and not there yet: {', '.join(sorted(to_come))}")
        for text in mistakes:
            print_error(f"error: {text}")
    if mistakes:
        raise typer.Exit(1)


def _hours(found: JobForecast) -> float | None:
    known = [run.hours for run in found.runs if run.hours is not None]
    return sum(known) if known and len(known) == len(found.runs) else None


def _print_run(run: RunForecast) -> None:
    share = f"{run.workers} x {run.global_batch // run.workers}" if run.workers > 1 else "1 worker"
    steps = "unknown steps" if run.steps is None else f"{run.steps:,} steps"
    samples = "" if run.samples is None else f", {run.samples:,} samples"
    print_text(f"{run.name}: {steps} of {run.global_batch} pairs ({share}){samples}")
    width = max(map(len, run.sources), default=0)
    for name, source in run.sources.items():
        seen = f"{source.steps:>9,.6g} steps {source.epochs:>7.2f} epochs"
        print_text(f"  {name:<{width}} {source.samples:>10,} samples {seen}")
    if run.memory_bytes is not None:
        _print_memory(run, run.memory_bytes)
    if run.hours is not None:
        print_text(f"  {run.hours:.1f} hours of steps, without starts, held-out scores and checkpoints")


def _print_memory(run: RunForecast, parts: dict[str, int]) -> None:
    chunks = f"chunks of {run.chunk_tokens:,} tokens" if run.chunk_tokens else "all inputs at once"
    print_text(
        f"  memory of a worker {_size(parts['total'])}: {chunks}, inputs of up to {run.largest_input_tokens:,} tokens"
    )
    for part, title in _PARTS.items():
        if part == "loss" and not parts[part]:  # of a re-ranker: one number a pair
            continue
        print_text(f"    {title:<{_TITLE_WIDTH}} {_size(parts[part]):>10}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"
