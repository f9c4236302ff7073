"""One rank of a training run: build the learner, resume, run the steps, write the model. Knows DeepSpeed, not Ray.

resume -> for each step:  batch -> seed -> lr -> parts: forward -> backward -> update or skip -> row -> score
       -> checkpoint -> model

What a step computes is the `Learner`'s: that of an embedder, or of a re-ranker.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.imports import without_garbage_collection, without_modules
from rzen.config import (
    RerankObjectiveConfig,
)
from rzen.export.export import write_model
from rzen.model.checkpoints import checkpoint_dir, checkpoint_sha256
from rzen.model.lora import save_adapter
from rzen.reranking.head import untied_head
from rzen.training import checkpoint
from rzen.training.batch import FeedBatchProtocol
from rzen.training.build import build_learner
from rzen.training.checkpoint_manager import ASK_S, CheckpointManager, CheckpointStore
from rzen.training.checkpoint_state import Origin
from rzen.training.chunk_size import AutoChunk, settle_chunk
from rzen.training.divergence import divergence_error
from rzen.training.held_out import HeldOut, HeldOutScorer
from rzen.training.held_out_scores import HeldOutRow
from rzen.training.learner import Learner
from rzen.training.memory import BUCKET_ELEMENTS, WHOLE_ELEMENTS
from rzen.training.optim import build_optimizer, lr_at, set_lr
from rzen.training.stage import Stage
from rzen.training.telemetry import Row, step_row
from rzen.training.temperatures import use_fp32_temperatures


def train_stage(
    stage: Stage,
    *,
    backbone_dir: str,
    init_adapter: Path | None,
    tasks: Sequence[str],
    batches: Callable[[int], Iterator[FeedBatchProtocol]],
    checkpoints: CheckpointStore,
    output: Path,
    on_metrics: Callable[[Row], None],
    held_out: HeldOut | None = None,
    on_scores: Callable[[HeldOutRow], None] = lambda row: None,
    on_chunk: Callable[[int], None] = lambda tokens: None,
    preempted: Callable[[], bool] = lambda: False,
    num_threads: int | None = None,
) -> None:
    """Train from the checkpoint that `checkpoints` resumes, or from step 0, to the last step or `stage.stop`.

    Every rank calls it. `batches(n)` yields this rank's batches of step n, n + 1, ... The model appears in `output` on
    rank 0's machine: an adapter directory, or a full one for `load_encoder`. If the best checkpoint is not the last,
    its model appears in `best` next to it.

    `on_metrics` is called on rank 0 after each step, `on_scores` when `held_out` was scored, and `on_chunk` when the
    tokens of a chunk have been found. All ranks ask `preempted` every few seconds. If it returns True, a node or the
    run is about to stop, and a checkpoint is taken at once. The process group that exists is used, else one of one
    process is made. `num_threads` is that of torch on the CPU.

    Raises `UserError` where too many steps in a row have no finite loss or gradient, or where a checkpoint does not
    fit. Raises `RuntimeError` where the batches end early or come out of order.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    ensure_process_group()
    learner = build_learner(stage, backbone_dir, init_adapter, tasks)
    engine, optimizer = build_engine(learner, stage)
    engine.train()
    if isinstance(stage.chunk_tokens, AutoChunk):
        learner.chunk_tokens = settle_chunk(
            stage.chunk_tokens, learner, backbone_dir, stage.model, stage.objective, stage.optim
        )
        if dist.get_rank() == 0:
            on_chunk(learner.chunk_tokens)
    newest = checkpoints.latest()
    start = 0
    if newest is not None:
        start = checkpoint.restore(engine, newest, plan_fingerprint=stage.plan_fingerprint)
        use_fp32_temperatures(engine)

    stop = stage.num_steps if stage.stop is None else stage.stop
    if start < stop:
        checkpoint_manager = CheckpointManager(
            engine,
            checkpoints,
            start=start,
            every_steps=stage.checkpoint_every_steps,
            origin=Origin(stage.plan_fingerprint, stage.run, stage.settings_sha256),
            preempted=preempted,
        )
        scorer = HeldOutScorer(engine, held_out, num_steps=stage.num_steps, on_scores=on_scores)
        if start == 0:
            scorer.after(0)
        feed = ThreadPoolExecutor(max_workers=1)
        try:
            with checkpoint_manager:
                arrivals = _arrivals(feed, batches(start), checkpoint_manager, start)
                _run_steps(
                    stage, engine, optimizer, range(start, stop), arrivals, scorer, checkpoint_manager, on_metrics
                )
        finally:
            feed.shutdown(wait=False)  # after an error it may wait for a batch that never comes
    if stop == stage.num_steps:
        save_model(stage, engine, checkpoint.full_parameters(engine), backbone_dir, output)
        best = checkpoints.best() if dist.get_rank() == 0 else None
        if best is not None:
            weights = checkpoint.read_parameters(engine, best)
            save_model(stage, engine, weights, backbone_dir, output.with_name("best"))


def _arrivals(
    feed: Executor, batches: Iterator[FeedBatchProtocol], checkpoint_manager: CheckpointManager, start: int
) -> Iterator[FeedBatchProtocol | None]:
    """Yield the batches from step `start` on, each when all ranks have theirs; None where they end."""
    for step in count(start):
        coming = feed.submit(next, batches, None)
        ready = False
        while not ready:
            wait([coming], timeout=ASK_S)
            if coming.done() and (error := coming.exception()) is not None:
                raise error
            ready = checkpoint_manager.all_ready(coming.done(), step)
        yield coming.result()


def _run_steps(
    stage: Stage,
    engine: Any,
    optimizer: torch.optim.Optimizer,
    steps: range,
    arrivals: Iterator[FeedBatchProtocol | None],
    scorer: HeldOutScorer,
    checkpoint_manager: CheckpointManager,
    on_metrics: Callable[[Row], None],
) -> None:
    skipped_in_a_row = 0
    for step in steps:
        began_s = _now_s(engine.device)
        fed = next(arrivals)
        if fed is None or fed.step != step:
            raise RuntimeError(f"the feed brought {'nothing' if fed is None else fed.step} for step {step}")
        arrived_s = _now_s(engine.device)

        seed_step(stage.seed, step)
        lr = lr_at(step, stage.num_steps, stage.optim)
        set_lr(optimizer, lr)
        outputs: list[Any] = []
        skipped = not update(engine, _losses(engine, fed, outputs))
        stats = engine.module.statistics(fed.batch, outputs)

        row = step_row(
            fed,
            stats,
            skipped=skipped,
            grad_norm=float(engine.get_global_grad_norm()),
            lr=lr,
            feed_wait_s=arrived_s - began_s,
            step_s=_now_s(engine.device) - began_s,
            device=engine.device,
        )
        if dist.get_rank() == 0:
            on_metrics(row)
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if skipped_in_a_row > stage.optim.max_skipped_steps:
            raise divergence_error(engine.module, fed, row, skipped_in_a_row)
        scorer.after(step + 1)  # before the checkpoint, which keeps the score
        checkpoint_manager.after(row, is_last=step + 1 == steps.stop)


def _losses(engine: Any, fed: FeedBatchProtocol, outputs: list[Any]) -> Iterator[Tensor]:
    """Yield the losses of a batch, part after part, so that one part's activations are gone before the next."""
    blocks = [(block.task, block.num_samples) for block in fed.blocks]
    for part in engine.module.parts(fed.batch):
        loss, output = engine(part, blocks, fed.step)
        outputs.append(output)
        yield loss


def ensure_process_group() -> None:
    """Use the process group that exists, or make one of this process that lasts until it ends."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def build_engine(learner: Learner, stage: Stage) -> tuple[Any, torch.optim.Optimizer]:
    """Return DeepSpeed's engine around the learner, and the AdamW in it, whose groups have the learning rates.

    The engine is on the GPU if the process group has NCCL, else on the CPU.
    """
    on_gpu = "nccl" in dist.get_backend_config()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # set by launchers; without one, all ranks are here
    # Its autotuner imports MLflow if it is installed, which takes half a second.
    with without_garbage_collection(), without_modules("mlflow"):
        import deepspeed  # here, because it reads the variables above
        import deepspeed.ops

    if not on_gpu:
        # Otherwise it compiles an extension for shared memory. A build that is killed leaves a lock, on which every
        # later run waits indefinitely.
        deepspeed.ops.__compatible_ops__ = {}
    optimizer = build_optimizer(learner, stage.optim)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # required, unused: batches come from the feed and differ by source
        "gradient_accumulation_steps": 1,
        "gradient_clipping": stage.optim.max_grad_norm,
        "bf16": {"enabled": stage.model.dtype == "bfloat16"},
        # The type of the averages too: bf16 has 8 bits, and adding up many ranks would lose some of them.
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage.optim.zero_stage,
            "overlap_comm": False,  # see `update`
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            # Weights are released after each use. In models of many small modules, such as those with adapters,
            # DeepSpeed takes minutes to find out when the next use comes.
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
        },
    }
    exact = {
        name: value.detach().clone()
        for name, value in learner.named_parameters()
        if value.requires_grad and value.dtype == torch.float32 and stage.model.dtype == "bfloat16"
    }
    engine, *_ = deepspeed.initialize(model=learner, optimizer=optimizer, config=settings)
    checkpoint.create_moments(engine)
    checkpoint.put_parameters(engine, exact)  # DeepSpeed's fp32 copies are of parameters that it has rounded to bf16
    use_fp32_temperatures(engine)
    return engine, optimizer


def update(engine: Any, losses: Iterable[Tensor]) -> bool:
    """Run the backward pass of each loss, then one step for their sum. Return False if a gradient was not finite.

    The next loss is asked for after the backward pass of the one before. Where a gradient is not finite, all ranks skip
    the step.

    Gradients are averaged after the last backward pass, in the order of the parameters. By default DeepSpeed sends them
    in the order in which they are ready. That order differs on a rank without visuals, and DeepSpeed would silently add
    up gradients of different parameters (tests/parity/test_deepspeed.py).
    """
    with engine.coalesce_grad_reduction():
        for loss in losses:
            engine.backward(loss)
    engine.step()
    use_fp32_temperatures(engine)
    return bool(engine.was_step_applied())


def seed_step(seed: int, step: int) -> None:
    """Make dropout a pure function of (seed, step, rank), so that no random state has to be saved."""
    digest = hashlib.sha256(f"{seed} {step} {dist.get_rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]))


def save_model(stage: Stage, engine: Any, weights: Mapping[str, Tensor], backbone_dir: str, output: Path) -> None:
    """Write the adapter (fp32) or model (its own type) of these `weights` into the new folder `output`.

    Rank 0 writes. The engine cannot train any more, because its weights become these.
    """
    if dist.get_rank() != 0:
        return
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameter.data = weights[name]
    base, model = checkpoint_dir(backbone_dir), stage.model
    name = model.backbone if isinstance(model.backbone, str) else backbone_dir
    base_sha256 = checkpoint_sha256(base)
    backbone: Any = engine.module.model.backbone
    temperatures, identity = engine.module.temperatures(), stage.identity
    if model.tune == "lora":
        save_adapter(
            backbone,
            output,
            identity=identity,
            base=name,
            base_sha256=base_sha256,
            temperatures=temperatures,
        )
    else:
        lineage = {"base": name, "base_sha256": base_sha256}
        head = untied_head(base) if isinstance(stage.objective, RerankObjectiveConfig) else None
        write_model(backbone, base, output, identity, model.dtype, lineage, temperatures, head=head)


def _now_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
