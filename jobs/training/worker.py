"""One Ray Train worker: connects the data loader, the trainer and the run's folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util.metrics import Counter, Gauge

from jobs.runtime.progress import Progress
from jobs.training.checkpoints import Checkpoints
from jobs.training.encoder import backbone_url, encoder_of
from jobs.training.memory import chunk_of
from jobs.training.process_group import process_group
from jobs.training.runs import BEST, RESULTS, samples_seen
from jobs.training.tracking import Tracker
from pipelines.feed.feed import RESUME, SHARD, batches, start_reading
from pipelines.imports import importing_models
from pipelines.storage.faults import report_outages
from pipelines.storage.publish import publish_folder
from rzen.model.locate import checkpoint_folder, local_folder

if TYPE_CHECKING:
    from pipelines.feed.batch import FeedBatch
    from rzen.training.held_out_scores import HeldOutRow
    from rzen.training.telemetry import Row


def train_worker(config: dict[str, Any]) -> None:
    """Train on one worker of Ray Train. `config` holds the prepared run, its stop and the progress actor `board`."""
    prepared, stop, board = config["prepared"], config["stop"], config["board"]
    run, plan, spec = prepared.run, prepared.plan, prepared.run.spec
    # Decoding starts first: it needs as long as the imports and the model.
    blocks = start_reading(ray.train.get_dataset_shard(SHARD), spec.feed.prefetch_tasks)
    with importing_models():
        from rzen.training.held_out import HeldOut
        from rzen.training.stage import Stage
        from rzen.training.telemetry import HELD_OUT, HELD_OUT_METRIC, REJECTED, RUN_METRICS, metrics_of
        from rzen.training.worker import train_stage

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    def note(event: str) -> None:
        board.note.remote(spec.name, event)

    report_outages(note)
    # The start is that of the feed, which has read it once for this group of workers.
    checkpoints = Checkpoints(run, ray.train.get_dataset_shard(RESUME), note)
    trackers: list[Tracker] = []
    gauges = {
        name: Gauge(f"rzen_{name}", metric.description, ("run", "source", "task"))
        for name, metric in metrics_of(spec.objective).items()
    }
    run_gauges = {name: Gauge(f"rzen_{name}", metric.description, ("run",)) for name, metric in RUN_METRICS.items()}
    held_out_gauge = Gauge(f"rzen_{HELD_OUT}", HELD_OUT_METRIC.description, ("run", "source"))
    rejected = Counter(f"rzen_{REJECTED}", "samples that were replaced", ("run", "source", "reason"))

    def counted(feds: Iterator[FeedBatch]) -> Iterator[FeedBatch]:
        for fed in feds:
            for item in fed.rejected:
                rejected.inc(1, {"run": spec.name, "source": fed.source, "reason": item.reason})
            for item in fed.rejected_candidates:
                rejected.inc(1, {"run": spec.name, "source": fed.source, "reason": f"candidate_{item.reason}"})
            yield fed

    def tracker() -> Tracker:
        if not trackers:  # by now the rows before are known
            trackers.append(
                tracking.enter_context(closing(Tracker(run, checkpoints.metrics, list(checkpoints.held_out))))
            )
        return trackers[0]

    def on_metrics(row: Row) -> None:
        tracker().log(row)
        checkpoints.metrics.append(row)
        run_gauges["progress"].set((int(row["step"]) + 1) / plan.num_steps, {"run": spec.name})
        run_gauges["checkpoint_time_s"].set(checkpoints.published_s, {"run": spec.name})
        labels = {"run": spec.name, "source": str(row["source"]), "task": str(row["task"])}
        for name, gauge in gauges.items():
            gauge.set(float(row[name]), labels)
        board.post.remote(
            spec.name, Progress(int(row["step"]) + 1, plan.num_steps, figures=_figures(row, checkpoints.held_out))
        )

    def on_scores(row: HeldOutRow) -> None:
        tracker().log(row)
        checkpoints.held_out.append(row)
        for source, some in row["sources"].items():
            held_out_gauge.set(some["hit"], {"run": spec.name, "source": source})

    def on_chunk(tokens: int) -> None:
        run.record_chunk(tokens)
        note(f"reads chunks of {tokens:,} tokens")

    held_out = prepared.held_out and HeldOut(
        prepared.held_out.every_steps, lambda: prepared.held_out.read(encoder_of(run), rank, world_size)
    )
    with tempfile.TemporaryDirectory(prefix="rzen-result-") as scratch:
        output = Path(scratch, "result")
        with process_group(on_gpu=spec.cluster.gpus_per_worker > 0), ExitStack() as tracking:
            train_stage(
                Stage(
                    model=spec.model,
                    objective=spec.objective,
                    optim=spec.optim,
                    num_steps=plan.num_steps,
                    seed=spec.seed,
                    checkpoint_every_steps=spec.checkpoint.every_steps,
                    plan_fingerprint=plan.fingerprint(),
                    chunk_tokens=chunk_of(run, plan),
                    stop=stop,
                    run=run.id,
                    settings_sha256=run.settings_sha256,
                ),
                backbone_dir=checkpoint_folder(backbone_url(run), run.endpoint),
                init_adapter=Path(local_folder(spec.init_adapter, run.endpoint)) if spec.init_adapter else None,
                tasks=prepared.tasks,
                batches=lambda start: counted(
                    batches(
                        blocks,
                        plan.until(stop),
                        rank=rank,
                        world_size=world_size,
                        start=start,
                        max_bad_fraction=spec.data.max_bad_fraction,
                    )
                ),
                checkpoints=checkpoints,
                output=output,
                on_metrics=on_metrics,
                held_out=held_out,
                on_scores=on_scores,
                on_chunk=on_chunk,
                preempted=lambda: ray.train.get_preemption_info() is not None or ray.get(board.is_stopping.remote()),
                num_threads=spec.cluster.threads_per_worker,
            )
        if rank == 0 and stop == plan.num_steps:
            made = {run.result: output, BEST: output.with_name(BEST)}
            for name in RESULTS:
                if (folder := made.get(name)) is not None and folder.is_dir():
                    publish_folder(folder, run.store.child(name))
                else:
                    run.store.delete_tree(name)  # of a run that this one replaces
            rows = checkpoints.metrics
            replaced = sum(int(row["bad_samples"]) for row in rows)
            seen = {"sources": samples_seen(rows, plan.sources), "replaced": replaced}
            run.finish({"steps": plan.num_steps, "last": rows[-1]} | seen, rows, checkpoints.held_out)


def _figures(row: Row, scores: Sequence[HeldOutRow]) -> dict[str, str]:
    """Return the metrics of a row and the newest held-out score, as the progress table shows them."""
    watched = {
        "loss": f"{row['loss']:.3f}",
        **({"held-out": f"{scores[-1]['hit']:.0%}"} if scores else {}),
        "in batch": f"{row['accuracy']:.0%}",
        **({"tau": f"{row['temperature']:.3f}"} if "temperature" in row else {}),
        "samples/s": f"{row['samples_per_s']:.0f}",
        "waiting": f"{row['feed_wait_fraction']:.0%}",
        "source": str(row["source"]),
    }
    return watched | ({"skipped": f"gradient norm {row['grad_norm']}"} if row["skipped"] else {})
