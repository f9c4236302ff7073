"""Commands for runs and submitted jobs: runs, logs, stop."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.options import Address, AsJson, print_json
from jobs.commands.output import print_text
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.runtime.job_server import JobServer
    from pipelines.storage.store import Store

_DEFAULT = "runs"
_POLL_S = 1.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def runs(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="directory or s3:// URL")] = _DEFAULT,
    as_json: AsJson = False,
) -> None:
    """List the training runs below a folder: state, step, loss, held-out scores, start."""
    from jobs.training.listing import runs_below
    from pipelines.storage.location import exists, open_store

    found = [asdict(run) for run in runs_below(open_store(folder))]
    if not found and not exists(folder):
        raise UserError(folder, "does not exist", "name the folder of `run.root`")
    if as_json:
        print_json(found)
        return
    if not found:
        print_text(f"{folder}: no runs")
        return
    rows = [("run", "state", "step", "loss", "held-out", "best", "started (UTC)", "folder")]
    for run in found:
        loss = run["loss"]
        rows.append(
            (
                run["name"],
                run["state"],
                f"{run['step']:,}/{run['steps']:,}" if run["steps"] else "",
                "" if loss is None else f"{loss:.4f}",
                *("" if score is None else f"{score:.1%}" for score in (run["held_out"], run["best_held_out"])),
                run["started"] or "",
                run["folder"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_text("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run, its name in runs/, or id of a job")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines until the end")] = False,
    address: Address = None,
) -> None:
    """Print the log of a training run, or of a submitted job.

    With -f, the exit status is 0 for a run that finished, and that of a submitted job.
    """
    if (store := _run_folder(run)) is not None:
        raise typer.Exit(_print_log(store, follow))
    from jobs.runtime.follow import attach, print_log

    server = _server_of(run, address)
    if follow:
        raise typer.Exit(attach(server, run))
    print_log(server, run)


def stop(
    job: Annotated[str, typer.Argument(metavar="ID", help="submission id of the job")],
    address: Address = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="return before the job has ended")] = False,
) -> None:
    """Stop a submitted job and wait for its end. It takes up to a minute for a last checkpoint.

    The same `rzen submit` resumes it later. A run that `rzen run` started ends with Ctrl-C.
    """
    if (store := _run_folder(job)) is not None:
        raise _local(store)
    from jobs.runtime.follow import stop as stop_job

    stop_job(_server_of(job, address), job, wait=not no_wait)


def _run_folder(name: str) -> Store | None:
    """Return the folder of a run that was named by path, URL, or name in `runs/`. None if there is none."""
    from jobs.training.runs import SPEC
    from pipelines.storage.location import open_store

    places = [name] if "/" in name else [name, f"{_DEFAULT}/{name}"]
    return next((store for place in places if (store := open_store(place)).exists(SPEC)), None)


def _server_of(name: str, address: str | None) -> JobServer:
    """Return the job server that may know a job, for a name that is not that of a run."""
    from jobs.runtime.job_server import Access, JobServer

    listed = "`rzen runs FOLDER` lists the runs below a folder"
    if not _ID.fullmatch(name):
        raise UserError(name, "is not the folder of a run", listed)
    try:
        return JobServer(Access(address))
    except UserError as error:
        raise UserError(name, f"is not a run in {_DEFAULT}/, and {error.place}: {error.problem}", listed) from error


def _print_log(store: Store, follow: bool) -> int:
    """Print the log of a run, and with `follow` what is new until its end. Return the exit status."""
    from jobs.runtime.lease import active_holder
    from jobs.training.runs import DONE, LOG

    printed = 0
    while True:
        is_running = follow and active_holder(store) is not None  # before its last lines are read
        text = store.read(LOG).decode() if store.exists(LOG) else ""
        print_text(text[printed:], end="")
        printed = len(text)
        if not is_running:
            return int(follow and not store.exists(DONE))
        time.sleep(_POLL_S)


def _local(store: Store) -> UserError:
    from jobs.runtime.lease import active_holder

    if (holder := active_holder(store)) is None:
        return UserError(store.url, "is a run that nobody trains at present", "there is nothing to stop")
    problem = f"is a run of process {holder['process']} of {holder['by']}"
    fix = f"press Ctrl-C there or give `kill {holder['process']}`: it saves a checkpoint"
    return UserError(store.url, problem, f"{fix}. If it was submitted, name the id of the job")
