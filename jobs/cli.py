"""The command line, `rzen COMMAND`. `rzen --help` lists the commands.

The commands are functions of `jobs/commands`. This module puts them together and turns errors into exit statuses.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from jobs.commands import data, look, models, new, plan, registry, runs, spec
from jobs.commands.group import CommandGroup
from jobs.commands.output import SafeFormatter, print_error, print_text
from pipelines.errors import UserError

EXAMPLES = """\
Examples, from files to search:

\b
  rzen run jobs/demo.yaml                                 everything, on a small synthetic corpus
  rzen look products.csv                                  show what is in a table, and the spec that reads it
  rzen ingest ~/photos s3://bucket/photos                 turn a folder of files into shards
  rzen index 's3://bucket/laion/{00000..00099}.tar' s3://bucket/data    or: use existing shards where they are
  rzen verify s3://bucket/photos                          check that nothing is damaged or missing
  rzen curate s3://bucket/photos s3://bucket/drops       list duplicates and leaked samples, for data.curation
  rzen run jobs/stage1.yaml --set data.root=s3://bucket/photos
  rzen run jobs/stage2.yaml --set data.root=s3://bucket/photos --set optim.lr=1e-4
  rzen plan jobs/stage2.yaml --samples-per-s 8            show steps, memory of a worker, hours, and what is missing
  rzen explain optim.lr                                   show what a setting does, its default and its limits
  rzen submit jobs/finetunes.yaml --address http://head:8265
  rzen runs s3://bucket/runs                              list training runs: state, step, loss
  rzen logs runs/stage2 -f                                follow the log of a run, or of a submitted job by its id
  rzen stop raysubmit_a1b2c3                              stop a submitted job; it saves a checkpoint
  rzen run jobs/retrain.yaml                              on a schedule: train on new data, promote what is better
  rzen registry list                                      show the models and promotions
  rzen evaluate --list                                    show which benchmarks are there, and what to fetch
  rzen evaluate jobs/benchmark.yaml                       score models on MMEB-V2 and M-BEIR
  rzen mine s3://bucket/data model s3://bucket/negatives    find hard negatives of each sample
  rzen search "a pink star to the right of a cyan cross on a yellow background"
  rzen serve s3://bucket/model --corpus s3://bucket/vectors    answer requests for vectors and searches over HTTP

To resume an interrupted job, give the same command again.

\b
Exit status: 0 success, 1 an error that the message explains, 2 a wrong command line, 130 interrupted.
`rzen submit`, `attach` and `logs -f` exit with the status of the job, or with 75 if the cluster stops answering.
"""


class _Commands(CommandGroup):
    """Turns the errors of a command into one message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            print_error(f"error: {error}")
            raise typer.Exit(error.status) from None
        except KeyboardInterrupt as interrupt:  # with what the same command will do, if it was a job
            print_error(f"\n{': '.join(['interrupted', *interrupt.args])}")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever reads the output has seen enough
            pass
        except OSError as error:
            if error.errno is None:
                raise
            print_error(f"error: {error.filename or 'operating system'}: {error.strerror}")
        raise typer.Exit(1)


# Plain help, without boxes: it is read in logs and pagers, and its examples keep their lines.
app = typer.Typer(
    name="rzen",
    cls=_Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
LogLevel = Literal["debug", "info", "warning", "error"]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_text(f"rzen {version('rzen')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    log: Annotated[
        LogLevel | None,
        typer.Option(envvar="RZEN_LOG", help="level of the log messages of rzen's own code (default: warning)"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print errors and results only; a job's results are its outputs")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Train universal multimodal embeddings: one vector space for text, images, videos and documents.

    Everything is a job: a YAML file (jobs/*.yaml) that says what to read, what to train and where results go. Change
    settings in the file, or for one run with --set. `rzen kinds` lists the kinds of job, `rzen explain --kind KIND`
    their settings.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    for package in ("jobs", "rzen", "pipelines"):
        logging.getLogger(package).setLevel((log or ("error" if quiet else "warning")).upper())
    warnings.simplefilter("ignore", FutureWarning)  # libraries announce theirs between our lines
    signal.signal(signal.SIGTERM, _interrupt)
    if quiet:
        from jobs.runtime.progress import quiet as quiet_output

        context.with_resource(quiet_output())


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _add(group: typer.Typer, commands: Sequence[Callable[..., None]]) -> None:
    for command in commands:
        name = command.__name__.removesuffix("_models").replace("_", "-")
        epilog = data.INDEX_EXAMPLES if command is data.index else None
        group.command(name, epilog=epilog)(command)


_add(app, [new.new, spec.validate, plan.plan, spec.run, spec.submit, spec.attach])
_add(app, [look.look, data.ingest, data.index, data.curate, data.export_data, data.verify])
_add(app, [runs.runs, runs.logs, runs.stop])
_add(app, [models.embed, models.mine, models.judge, models.evaluate, models.search, models.index_bench])
_add(app, [models.export, models.serve])
_registry = typer.Typer(cls=CommandGroup, rich_markup_mode=None)
_registry.callback()(registry.choose)
_add(_registry, [registry.list_models, registry.show, registry.diff, registry.promote, registry.rollback])
app.add_typer(_registry, name="registry")
_add(app, [spec.kinds, spec.explain, spec.schema])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit status: 0 success, 1 an error, 2 a wrong command line, 130 interrupted."""
    try:
        app(arguments, prog_name="rzen")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
