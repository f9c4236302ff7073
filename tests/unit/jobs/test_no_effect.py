"""Settings without effect: each entry of the tables warns under its condition only, where the setting does nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.cli import main
from jobs.spec.kinds import find_kind, kind_names
from jobs.spec.load import Document, check, override
from jobs.spec.no_effect import unused_settings
from jobs.training import tracking
from jobs.training.specs import TrainSpec
from pipelines.media.decode import Decoder
from pipelines.plan.build import build_plan
from pipelines.plan.resample import next_mixture_change
from pipelines.plan.types import SourceTable
from rzen.config import RerankObjectiveConfig
from rzen.objective.batch import Batch, Mined, TeacherVectors
from rzen.objective.loss import Objective
from rzen.reranking.loss import pair_weights
from rzen.training import rerank
from rzen.training.build import build_learner
from rzen.training.optim import lr_at, parameter_groups
from rzen.training.stage import Stage
from rzen.vectors import unit_vectors
from tests.paths import ROOT
from tests.tiny import TINY, tiny_checkpoint

BASES: dict[str, dict[str, Any]] = {
    "train": {
        "kind": "train",
        "name": "t",
        "data": {"root": "data"},
        "model": {"backbone": "x", "dtype": "float32"},
        "global_batch": 8,
    },
    "evaluate": {"kind": "evaluate", "models": {"a": {"base": "a"}}, "data": {"root": "d"}, "out": "o"},
    "judge": {
        "kind": "judge",
        "table": "t",
        "data": {"root": "d"},
        "api": {"url": "u", "model": "m"},
        "out": "o",
    },
    "embed": {"kind": "embed", "model": "m", "data": {"root": "d"}, "out": "o"},
    "mine": {"kind": "mine", "model": "m", "data": {"root": "d"}, "out": "o"},
    "curate": {"kind": "curate", "data": {"root": "d"}, "out": "o"},
    "cluster": {"kind": "cluster", "table": "t", "out": "o"},
    "select": {"kind": "select", "table": "t", "out": "o"},
    "export": {"kind": "export", "model": {"base": "b"}, "out": "o"},
    "check": {"kind": "check", "model": "m", "data": {"root": "d"}, "out": "o"},
    "search": {"kind": "search", "queries": ["q"], "vectors": "v", "html": "h.html"},
    "serve": {"kind": "serve", "model": "m"},
    "corpus": {"kind": "corpus", "out": "o"},
    "ingest": {"kind": "ingest", "input": "i", "out": "o"},
    "index": {
        "kind": "index",
        "out": "o",
        "sources": {"a": {"urls": ["a"], "task": "t", "query": {"text": "txt"}, "positive": {"media": "jpg"}}},
    },
    "finetunes": {"kind": "finetunes", "stage": "s.yaml", "runs": {"a": {}}, "out": "o", "evaluate": {"spec": "e"}},
    "soup": {"kind": "soup", "models": {"a": {"base": "b", "adapter": "a"}}, "out": "o", "evaluate": {"spec": "e"}},
    "ablation": {
        "kind": "ablation",
        "stage": "s.yaml",
        "variants": {"baseline": {}, "b": {}},
        "evaluate": {"spec": "e"},
        "out": "o",
    },
    "retrain": {"kind": "retrain", "stage": "s.yaml", "evaluate": {"spec": "e"}, "registry": "r"},
}


def spec_of(kind: str, sets: Sequence[str]) -> Any:
    return check(override(Document(BASES[kind], "job.yaml", Path()), sets))


def unused(kind: str, sets: Sequence[str]) -> set[tuple[str, str]]:
    return {(".".join(found.key), found.reason) for found in unused_settings(spec_of(kind, sets))}


Outcome = Callable[[TrainSpec], Any]


@dataclass(frozen=True)
class Case:
    """`setting` has no effect with `condition`, and has one with `otherwise`."""

    kind: str
    entry: str
    reason: str
    setting: str
    condition: tuple[str, ...]
    otherwise: tuple[str, ...] | None = ()
    """None: the setting never has an effect."""
    outcome: Outcome | None = None
    """What the setting decides. Equal with and without it under the condition, and different otherwise."""


def tables() -> dict[str, SourceTable]:
    return {"a": SourceTable(64), "b": SourceTable(64)}


def plan_of(spec: TrainSpec) -> Any:
    arguments = {"global_batch": spec.global_batch, "steps": spec.steps, "epochs": spec.epochs, "seed": spec.seed}
    plan = build_plan(tables(), spec.data.mixture, **arguments)
    return [plan.batch(step) for step in range(plan.num_steps)]


def mixture_changes(spec: TrainSpec) -> Any:
    """The batches after every change of the mixture, with losses that fall faster for one source."""
    arguments = {"global_batch": spec.global_batch, "steps": spec.steps, "epochs": spec.epochs, "seed": spec.seed}
    plan = build_plan(tables(), spec.data.mixture, **arguments)
    rows: list[Mapping[str, Any]] = []
    for step in range(plan.num_steps):
        if spec.data.mixture.resample and (due := next_mixture_change(plan, rows, step, spec.data.mixture.resample)):
            plan = plan.with_mixture_phase(due)
        source = plan.batch(step).blocks[0].source
        rows.append({"step": step, "source": source, "loss": 1.0 if source == "a" else 1.0 / (step + 1)})
    return [plan.batch(step) for step in range(plan.num_steps)]


def loss_of(spec: TrainSpec) -> Any:
    """The losses of all steps, of queries with mined negatives as far as the data loader brings them."""
    torch.manual_seed(0)
    queries, targets, mined = (unit_vectors(torch.randn(size, 6) + 2) for size in (4, 4, 8))
    scores = torch.linspace(0.1, 0.9, 8)
    brought = Mined(mined, torch.arange(8) % 4, scores)
    if not spec.objective.of_task("t").mined.shared:
        places = torch.arange(8).view(2, 4).T
        brought = Mined(mined[places], brought.owners[places], scores[places])
    objective = Objective(spec.objective, ["t"])
    teacher = TeacherVectors(targets, queries) if spec.data.teacher_vectors else None
    mined = brought if spec.data.negatives_per_sample else None
    batch = Batch(
        queries, targets, "t", all_queries=queries, mined=mined, teacher_scores=scores[:4], teacher_vectors=teacher
    )
    return [objective(batch, step)[0].item() for step in range(spec.steps or 40)]


def rerank_loss_of(spec: TrainSpec) -> Any:
    """The loss of a re-ranker for two queries with three pairs each."""
    assert isinstance(spec.objective, RerankObjectiveConfig)
    z, is_positive = torch.arange(6.0), torch.tensor([True, False, False] * 2)
    weights = pair_weights(torch.tensor([3, 3]), is_positive, spec.objective.positive_weight)
    return rerank.loss_of(spec.objective, z, is_positive, weights, [3, 3], 2).item()


def learner_of(spec: TrainSpec, folder: Path) -> Any:
    base = tiny_checkpoint(folder, TINY)
    stage = Stage(spec.model, spec.objective, spec.optim, spec.steps or 3, spec.seed, 3, "p")
    return build_learner(stage, base, None, ["t"])


def trained_of(spec: TrainSpec, folder: Path) -> Any:
    return {name: value.shape for name, value in learner_of(spec, folder).named_parameters() if value.requires_grad}


def temperature_group(spec: TrainSpec, folder: Path) -> Any:
    groups = parameter_groups(learner_of(spec, folder), spec.optim)
    return [(group["lr_scale"], group["bounds"]) for group in groups if group["name"] == "temperatures"]


def rates(spec: TrainSpec) -> Any:
    steps = spec.steps or 100
    return [lr_at(step, steps, spec.optim) for step in range(steps)]


def is_in_sandbox(spec: TrainSpec) -> Any:
    limits = (spec.data.media.max_cpu_s, spec.data.media.max_memory_bytes)
    decoder = Decoder(spec.data.media, trusted=spec.data.trusted)
    return [limits for kind in ("video", "document", "image") if decoder._in_sandbox(kind, b"")]  # type: ignore[arg-type]


def readers_of_project(spec: TrainSpec) -> Any:
    """The sinks that read `project` in their source, of those that the spec asks for."""
    asked = {"_Mlflow": spec.run.tracking.mlflow, "_Wandb": spec.run.tracking.wandb}
    using = [
        name for name, kind in vars(tracking).items() if inspect.isclass(kind) and "config.project" in source(kind)
    ]
    assert sorted(using) == sorted(asked)
    return [spec.run.tracking.project for name in using if asked[name]]


def source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


LORA, MINED, TEMPERATURE = "model.lora", "objective.mined", "objective.temperature"
STEPS20 = ("steps=20",)
CANDIDATES = ("data.candidates=c", "data.negatives_per_sample=2")
POINTWISE = ("objective={kind: rerank}", "data.negatives_per_sample=2")
LISTWISE = ("objective={kind: rerank, loss: listwise}", "data.negatives_per_sample=2")
TRAINING = [
    Case(
        "train",
        "objective.list_temperature",
        "no softmax over a list",
        "objective.list_temperature=2.0",
        POINTWISE,
        LISTWISE,
        rerank_loss_of,
    ),
    Case(
        "train",
        "objective.positive_weight",
        "one positive in each list",
        "objective.positive_weight=2.0",
        LISTWISE,
        POINTWISE,
        rerank_loss_of,
    ),
    Case("train", "epochs", "steps", "epochs=3.0", STEPS20, outcome=plan_of),
    Case("train", LORA, "trains every weight", "model.lora.rank=8", ("model.tune=full",), outcome=trained_of),
    Case("train", LORA, "init_adapter decides", "model.lora.dropout=0.1", ("init_adapter=a",)),
    Case(
        "train",
        MINED,
        "negatives_per_sample is 0",
        "objective.mined.shared=false",
        (),
        ("data.negatives_per_sample=2",),
        loss_of,
    ),
    Case(
        "train",
        MINED,
        "symmetric",
        "objective.mined.hardness=null",
        ("objective.symmetric=1.0", "data.negatives_per_sample=2"),
        ("data.negatives_per_sample=2",),
        loss_of,
    ),
    *(
        Case(
            "train",
            "data.negatives_draw",
            reason,
            "data.negatives_draw=random",
            condition,
            ("data.candidates=table", "data.negatives_per_sample=2"),
        )
        for reason, condition in (
            ("candidates is not set", ("data.negatives_per_sample=2",)),
            ("negatives_per_sample is 0", ("data.candidates=table",)),
        )
    ),
    Case(
        "train",
        "objective.tasks.*.mined",
        "negatives_per_sample is 0",
        "objective.tasks={t: {mined: {shared: false}}}",
        (),
        ("data.negatives_per_sample=2",),
        loss_of,
    ),
    Case(
        "train",
        "data.negatives_per_sample",
        "symmetric",
        "data.negatives_per_sample=2",
        ("objective.symmetric=1.0",),
        (),
        loss_of,
    ),
    Case(
        "train",
        "objective.false_negatives.warmup_steps",
        "no false negative is ever dropped",
        "objective.false_negatives={threshold: 0.5, warmup_steps: 20}",
        STEPS20,
        ("steps=40",),
        loss_of,
    ),
    Case(
        "train",
        "data.teacher_vectors",
        "embedding_distillation is not set",
        "data.teacher_vectors=v",
        (),
        ("objective.embedding_distillation={}", "data.teacher_vectors=w"),
    ),
    Case(
        "train",
        "objective.distillation.teacher_temperature",
        "margin_mse has no temperatures",
        "objective.distillation.teacher_temperature=0.3",
        ("objective.distillation.loss=margin_mse", *CANDIDATES),
        ("objective.distillation.loss=kl", *CANDIDATES),
        loss_of,
    ),
    Case(
        "train",
        "objective.embedding_distillation.teacher_temperature",
        "mse has no temperatures",
        "objective.embedding_distillation.teacher_temperature=0.3",
        ("objective.embedding_distillation.loss=mse", "data.teacher_vectors=v"),
        ("objective.embedding_distillation.loss=kl", "data.teacher_vectors=v"),
        loss_of,
    ),
    *(
        Case(
            "train",
            f"{TEMPERATURE}.{name}",
            "learnable is false",
            f"{TEMPERATURE}.{name}={value}",
            (f"{TEMPERATURE}.learnable=false",),
            outcome=temperature_group,
        )
        for name, value in (("lr_scale", 2.0), ("minimum", 0.01), ("maximum", 0.3))
    ),
    Case(
        "train",
        "data.mixture.resample",
        "not below steps",
        "data.mixture.resample={every_steps: 20}",
        STEPS20,
        ("steps=60",),
        mixture_changes,
    ),
    Case(
        "train",
        "data.mixture.resample",
        "one source",
        "data.mixture.resample={every_steps: 4}",
        ("steps=12", "data.mixture.weights={a: 1.0}"),
        ("steps=12", "data.mixture.weights={a: 1.0, b: 2.0}"),
        mixture_changes,
    ),
    Case(
        "train",
        "data.mixture.blocks",
        "whole global batch",
        "data.mixture.blocks={a: 8}",
        ("global_batch=8",),
        ("global_batch=16",),
        plan_of,
    ),
    Case(
        "train", "optim.warmup_fraction", "less than one", "optim.warmup_fraction=0.04", STEPS20, ("steps=60",), rates
    ),
    *(
        Case(
            "train",
            f"data.media.{name}",
            "without limits",
            f"data.media.{name}={value}",
            ("data.trusted=true",),
            (),
            is_in_sandbox,
        )
        for name, value in (("max_cpu_s", 7), ("max_memory_bytes", 10**9))
    ),
    Case(
        "train",
        "run.tracking.project",
        "neither",
        "run.tracking.project=x",
        (),
        ("run.tracking.wandb=true",),
        readers_of_project,
    ),
]
# What these do is tested where they do it. Here: that the entry warns under its condition and not otherwise.
SUITES = ("suites={MMEB-V2: a}",)
CARD = (
    "{model_name: m, model_backbone: b, model_size: 2B, embedding_dimension: 8, max_length_tokens: 8,"
    " model_release_date: 2026-01-01, url: 'https://a.b'}"
)
RERANKED, TUNE, TUNED = "rerank.model={base: r}", "rerank.tune={root: t}", "rerank.tune"
LAMRA = "prompt.template=lamra"
PROBE, CHOOSE = "probe={spec: p}", ("soups={g: {method: greedy}}",)
OTHERS = [
    Case("evaluate", "datasets", "suites is empty", "datasets=[x]", (), SUITES),
    Case("evaluate", "submission", "MMEB-V2", f"submission={{a: {CARD}}}", (), SUITES),
    Case("evaluate", "media", "suites and custom", "media.frames=4", (), SUITES),
    Case("evaluate", "tasks", "data is not set", "tasks=[text_image]", ("data=null", *SUITES)),
    Case("evaluate", "metrics", "data is not set", "metrics=['hit@1']", ("data=null", *SUITES)),
    Case("evaluate", "data.mixture", "scored", "data.mixture.run_length=4", (), None),
    Case("evaluate", "data.negatives_per_sample", "not scored", "data.negatives_per_sample=2", (), None),
    Case("evaluate", "data.max_bad_fraction", "error", "data.max_bad_fraction=0.5", (), None),
    Case("evaluate", "data.instructions", "decides", "data.instructions=false", (), None),
    Case(
        "evaluate",
        "rerank.tune",
        "data is not set",
        "rerank.tune={root: t}",
        (RERANKED, "data=null", *SUITES),
        (RERANKED,),
    ),
    Case(
        "evaluate", "rerank.tune_tasks", "empty", f"{TUNED}_tasks={{a: b}}", (RERANKED, TUNE), (*SUITES, RERANKED, TUNE)
    ),
    Case("evaluate", "rerank.tune_queries", "not set", "rerank.tune_queries=9", (RERANKED,), (RERANKED, TUNE)),
    Case("evaluate", "rerank.tune.media", "data.media", f"{TUNED}.media.frames=4", (RERANKED, TUNE), None),
    Case("evaluate", "rerank.tune.mixture", "scored", "rerank.tune.mixture.run_length=4", (RERANKED, TUNE), None),
    Case(
        "evaluate",
        "rerank.tune.negatives_per_sample",
        "mined",
        f"{TUNED}.negatives_per_sample=2",
        (RERANKED, TUNE),
        None,
    ),
    Case("evaluate", "rerank.tune.max_bad_fraction", "error", f"{TUNED}.max_bad_fraction=0.5", (RERANKED, TUNE), None),
    Case("evaluate", "rerank.tune.instructions", "decides", f"{TUNED}.instructions=false", (RERANKED, TUNE), None),
    Case("mine", "data.mixture", "`sources` decides", "data.mixture.merge_small=true", (), None),
    Case("mine", "data.negatives_per_sample", "embedded", "data.negatives_per_sample=2", (), None),
    Case("mine", "data.max_bad_fraction", "no candidates", "data.max_bad_fraction=0.5", (), None),
    Case("mine", "ivf", "exact", "ivf.probes=8", (), ("search=ivf",)),
    Case("mine", "select.seed", "not random", "select.seed=3", (), ("select.choice=random",)),
    Case("mine", "select.low_rank", "not mm_embed", "select.low_rank=9", (), ("select.modality=mm_embed",)),
    Case("select", "selection.seed", "not random", "selection.seed=3", (), ("selection.choice=random",)),
    Case("select", "selection.low_rank", "not mm_embed", "selection.low_rank=9", (), ("selection.modality=mm_embed",)),
    Case("cluster", "first_rank", "origin", "first_rank=5", ("method=origin",)),
    Case("cluster", "num_ranks", "origin", "num_ranks=5", ("method=origin",)),
    Case("cluster", "cluster_size", "origin", "cluster_size=5", ("method=origin",)),
    Case("cluster", "seed", "origin", "seed=5", ("method=origin",)),
    Case("cluster", "origin", "preferences", "origin=^(a)", (), ("method=origin",)),
    Case("cluster", "root", "preferences", "root=d", (), ("method=origin",)),
    Case("judge", "data.split", "the table", "data.split=held_out", (), None),
    Case("judge", "data.mixture", "judged", "data.mixture.merge_small=true", (), None),
    Case("judge", "data.negatives_per_sample", "candidates", "data.negatives_per_sample=2", (), None),
    Case("judge", "data.max_bad_fraction", "no score", "data.max_bad_fraction=0.5", (), None),
    Case("judge", "chunk_tokens", "endpoint", "chunk_tokens=8", (), ("api=null", "model={base: b}")),
    Case("judge", "actors", "endpoint", "actors=8", (), ("api=null", "model={base: b}")),
    Case("judge", "cpus_per_actor", "endpoint", "cpus_per_actor=8", (), ("api=null", "model={base: b}")),
    Case("judge", "gpus_per_actor", "endpoint", "gpus_per_actor=8", (), ("api=null", "model={base: b}")),
    Case("judge", "autoscaling", "endpoint", "autoscaling=true", (), ("api=null", "model={base: b}")),
    Case("curate", "model", "are null", "model=m", (), ("rules.semantic={}",)),
    Case("curate", "dtype", "are null", "dtype=float32", (), ("rules.semantic={}", "model=m")),
    Case("curate", "actors", "are null", "actors=8", (), ("rules.semantic={}", "model=m")),
    Case("curate", "gpus_per_actor", "are null", "gpus_per_actor=8", (), ("rules.semantic={}", "model=m")),
    Case(
        "curate",
        "rules.semantic.full_clusters",
        "max_per_cluster is null",
        "rules.semantic.full_clusters=weigh",
        ("model=m",),
        ("model=m", "rules.semantic.max_per_cluster=9"),
    ),
    Case("curate", "data.mixture", "judged", "data.mixture.merge_small=true", (), None),
    Case("curate", "data.negatives_per_sample", "not judged", "data.negatives_per_sample=2", (), None),
    Case("curate", "data.max_bad_fraction", "rule of their own", "data.max_bad_fraction=0.5", (), None),
    Case("embed", "data.split", "splits", "data.split=held_out", (), None),
    Case("embed", "data.mixture", "embedded", "data.mixture.merge_small=true", (), None),
    Case("embed", "data.negatives_per_sample", "targets only", "data.negatives_per_sample=2", (), None),
    Case("embed", "data.max_bad_fraction", "skipped", "data.max_bad_fraction=0.5", (), None),
    Case(
        "embed",
        "segment_overlap_seconds",
        "not divided",
        "segment_overlap_seconds=5.0",
        (),
        ("segment_seconds=30.0",),
    ),
    Case("export", "frames", "video settings", "frames=4", ("format=rzen_release",), ("format=reranker",)),
    Case("export", "dimensions", "no width", "dimensions=[8]", ("format=reranker",)),
    Case("export", "pair_prompt", "format: reranker", f"pair_{LAMRA}", (), ("format=reranker",)),
    Case("export", "prompt", "pair_prompt", "prompt.max_visual_tokens=9", ("format=reranker",), None),
    Case("export", "readout", "no vectors", "readout.pooling=mean", ("format=reranker",), None),
    Case("export", "instructions", "format: model", "instructions={a: b}", ("format=adapter",)),
    Case("export", "dimensions", "no config.json", "dimensions=[8]", ("format=adapter",)),
    Case("export", "dtype", "keeps its type", "dtype=float32", ("format=adapter",)),
    Case("check", "data.mixture", "first samples", "data.mixture.merge_small=true", (), None),
    Case("check", "data.negatives_per_sample", "queries and targets only", "data.negatives_per_sample=2", (), None),
    Case("check", "data.max_bad_fraction", "left out", "data.max_bad_fraction=0.5", (), None),
    Case("search", "results", "html", "results=r.json", ("html=null",)),
    Case("search", "curves", "html", "curves={a: b}", ("html=null",)),
    Case(
        "corpus",
        "corpus.pages_per_document",
        "num_documents",
        "corpus.pages_per_document=3",
        ("corpus.num_documents=0",),
    ),
    Case("corpus", "corpus.repeats", "num_repeated", "corpus.repeats=3", (), ("corpus.num_repeated=5",)),
    Case("corpus", "corpus.clip_frames", "num_clips", "corpus.clip_frames=4", ("corpus.num_clips=0",)),
    Case("corpus", "corpus.hard_fraction", "num_images", "corpus.hard_fraction=0.5", ("corpus.num_images=0",)),
    Case(
        "ingest",
        "keep_uncaptioned",
        "both sides",
        "keep_uncaptioned=true",
        ("input=null", "sources.a={table: t.csv, preset: nli}"),
        (),
    ),
    Case("ingest", "media.page_pixels", "stored", "media.page_pixels=5000", (), ("materialized=true",)),
    Case("ingest", "media.frames", "stored", "media.frames=4", (), ("materialized=true",)),
    Case("ingest", "media.fps", "stored", "media.fps=2.0", (), ("materialized=true",)),
    Case("index", "media", "opens no file", "media.max_pixels=5000", (), ("decode=true",)),
    *(
        case
        for kind in ("finetunes", "soup")
        for case in (
            Case(kind, "probe", "greedy", PROBE, (), CHOOSE),
            Case(kind, "evaluate.set.models", "job sets it", "evaluate.set.models={}", (), None),
            Case(kind, "evaluate.set.out", "job sets it", "evaluate.set.out=x", (), None),
            Case(kind, "probe.set.models", "job sets it", "probe={spec: p, set: {models: {}}}", CHOOSE, None),
            Case(kind, "probe.set.out", "job sets it", "probe={spec: p, set: {out: x}}", CHOOSE, None),
        )
    ),
    Case("finetunes", "set.name", "names its runs", "set.name=x", (), None),
    Case("finetunes", "runs.*.name", "names its runs", "runs.a.name=x", (), None),
    Case("ablation", "evaluate.set.models", "job sets it", "evaluate.set.models={}", (), None),
    Case("ablation", "evaluate.set.out", "job sets it", "evaluate.set.out=x", (), None),
    Case("ablation", "set.name", "names its runs", "set.name=x", (), None),
    Case("ablation", "set.seed", "seeds", "set.seed=3", (), None),
    Case("ablation", "variants.*.name", "names its runs", "variants.b.name=x", (), None),
    Case("ablation", "variants.*.seed", "seeds", "variants.b.seed=3", (), None),
    Case("serve", "canary", "nothing is replaced", "canary={fraction: 0.5}", ("reload_s=null",)),
    Case("serve", "target_requests", "max_replicas", "target_requests=4", (), ("max_replicas=2",)),
    Case("serve", "anonymous", "loopback address", "anonymous=true", (), ("host=0.0.0.0",)),
    Case("retrain", "set.name", "names its runs", "set.name=x", (), None),
    Case("retrain", "evaluate.set.models", "job sets it", "evaluate.set.models={}", (), None),
    Case("retrain", "evaluate.set.out", "job sets it", "evaluate.set.out=x", (), None),
    Case("retrain", "corpus.set.model", "job sets it", "corpus={spec: e, set: {model: x}}", (), None),
    Case("retrain", "corpus.set.out", "job sets it", "corpus={spec: e, set: {out: x}}", (), None),
]
ALL = [*TRAINING, *OTHERS]


def matches(case: Case, found: set[tuple[str, str]]) -> bool:
    first = case.entry.split("*")[0].rstrip(".")
    return any(key.startswith(first) and case.reason in reason for key, reason in found)


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.kind} {case.entry} {case.reason}")
def test_a_setting_is_reported_where_it_has_no_effect_and_only_there(case: Case) -> None:
    assert matches(case, unused(case.kind, [*case.condition, case.setting]))
    if "warmup_steps" not in case.entry:  # reported with its default, too
        assert not matches(case, unused(case.kind, case.condition))
    if case.otherwise is not None:
        assert not matches(case, unused(case.kind, [*case.otherwise, case.setting]))


@pytest.mark.parametrize(
    "case", [case for case in TRAINING if case.outcome], ids=lambda case: f"{case.entry} {case.reason}"
)
def test_the_reported_setting_indeed_changes_nothing(case: Case, tmp_path: Path) -> None:
    assert case.outcome is not None

    def outcome(*sets: str) -> Any:
        assert case.outcome is not None
        needs_folder = len(inspect.signature(case.outcome).parameters) > 1
        arguments = (tmp_path,) if needs_folder else ()
        return case.outcome(spec_of("train", sets), *arguments)  # type: ignore[call-arg]

    without = "objective.false_negatives=null" if "false_negatives" in case.entry else "seed=0"
    assert outcome(*case.condition, case.setting) == outcome(*case.condition, without)
    assert case.otherwise is not None
    assert outcome(*case.otherwise, case.setting) != outcome(*case.otherwise, without)


def test_every_entry_has_a_case() -> None:
    entries = [(name, entry) for name in kind_names() for entry in find_kind(name).no_effect]
    assert len(entries) > 18
    for name, entry in entries:
        assert [
            case for case in ALL if case.kind == name and case.entry == entry.setting and case.reason in entry.reason
        ]


def test_validate_and_run_print_the_same_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job fails afterwards, because there are no data. Named specs are reported under the names of their runs."""
    stage = BASES["train"] | {"data": {"root": str(tmp_path / "none")}, "steps": 10}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage | {"epochs": 2.0}))
    finetunes = {"kind": "finetunes", "stage": "stage.yaml", "runs": {"a": {}, "b": {"seed": 2}}, "out": str(tmp_path)}
    path = tmp_path / "finetunes.yaml"
    path.write_text(yaml.safe_dump(finetunes | {"set": {"name": "x"}}))
    printed = []
    for command in ("validate", "run"):
        main([command, str(path)])
        lines = capsys.readouterr().err.splitlines()
        printed.append([line for line in lines if line.startswith("warning: ")])
    assert printed[0] == printed[1]
    assert f"warning: {path}:8: set.name='x' has no effect: the job names its runs" in printed[0]
    assert "warning: a, b: epochs=2.0 has no effect: steps is set" in printed[0]


def test_shipped_specs_have_no_setting_without_effect(capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((ROOT / "jobs").glob("*.yaml")):
        assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (["objective.temperature.lr_scale=0"], "lr_scale=0 leaves nothing to learn"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas.1=1.0: input should be less than 1"),
        (["model.quantize=nf4"], "model.quantize=nf4 needs a CUDA GPU; set cluster.gpus_per_worker"),
        (["data.split=valid"], "data.split='valid': input should be 'train' or 'held_out'"),
        (["objective={kind: rerank}"], "objective.kind: rerank needs negatives for each query"),
        ([*POINTWISE, "objective.matryoshka=[8]"], "objective.matryoshka is not a setting; known here: kind, loss,"),
        ([*POINTWISE, "objective.lists=1"], "objective.lists is not a setting; did you mean 'loss'"),
        ([*POINTWISE, "model.prompt.template=plain"], "model.prompt and model.readout are those of embedders"),
        (
            [*POINTWISE, "objective.prompt.max_visual_tokens=4", "data.media.frames=12"],
            "objective.prompt.max_visual_toke",
        ),
        (["objective.kind=ranking"], "must be a mapping, whose `kind` is `contrastive`"),
        (["global_batch=770", "cluster.workers=3"], "global_batch=770 cannot be shared evenly by 3 workers"),
    ],
)
def test_settings_that_cannot_work_are_refused(sets: list[str], problem: str) -> None:
    with pytest.raises(Exception, match=problem.replace("(", r"\(")):
        spec_of("train", sets)


def test_soups_that_cannot_be_made_are_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(BASES["train"]))
    path = tmp_path / "finetunes.yaml"
    path.write_text(yaml.safe_dump({"kind": "finetunes", "stage": "stage.yaml", "runs": {"a": {}}, "out": "o"}))
    for sets, problem in (
        (["base=b"], "base=b: adapters hold only what training changed"),
        (["set.model.tune=full", "soups={t: {method: ties}}"], "soups.t: method=ties of full models needs base"),
        (
            ["set.model.tune=full", "soups={t: {method: mean, rank: 4}}"],
            "soups.t: rank=4, but full models have no rank",
        ),
    ):
        assert main(["validate", str(path), *(part for text in sets for part in ("--set", text))]) == 1
        assert problem in capsys.readouterr().err
