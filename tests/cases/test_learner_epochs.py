"""What is called an epoch is what is seen: of the samples that a source has, in the steps that were trained."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jobs.training.fit import _seen
from jobs.training.runs import samples_seen
from pipelines.config import MixtureConfig
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.types import MixturePhase, SourceTable


def tables(**sizes: int) -> dict[str, SourceTable]:
    return {name: SourceTable(size) for name, size in sizes.items()}


def counted(plan: Plan) -> Counter[str]:
    return Counter(source for step in range(plan.num_steps) for source, _ in plan.batch(step).rows)


def test_the_summary_counts_samples_and_reports_what_an_epoch_leaves_out() -> None:
    """One step is half of 15 samples, rounded up to 8 of them: 0.53 epochs, where whole batches would give 1."""
    plan = build_plan(tables(a=15, b=808), MixtureConfig(), global_batch=8)
    assert counted(plan) == {"a": 8, "b": 808}
    assert plan.summary() == [
        "a: 15 samples, batches of 8, 1 of 102 steps (0.53 epochs)",
        "a: each epoch leaves out 7 of 15 samples, others each time: no whole batch",
        "b: 808 samples, batches of 8, 101 of 102 steps (1.00 epochs)",
    ]


def test_the_summary_reports_samples_that_a_limit_leaves_out() -> None:
    plan = build_plan(tables(a=1000), MixtureConfig(max_samples_per_source=80), global_batch=8)
    assert plan.summary() == [
        "a: 80 samples, batches of 8, 10 of 10 steps (1.00 epochs)",
        "a: 80 of 1000 samples are used, the same in every epoch: data.mixture.max_samples_per_source",
    ]


def rows_of(plan: Plan, skipped: tuple[int, ...] = (), bad: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "source": "+".join(block.source for block in plan.batch(step).blocks),
            "skipped": int(step in skipped),
            "bad_samples": bad,
        }
        for step in range(plan.num_steps)
    ]


def test_a_run_records_what_it_was_trained_on() -> None:
    """After a change of the mixture, with a step that was skipped: counted from the batches, one by one."""
    mixture = MixtureConfig(blocks={"c": 4, "d": 4})
    plan = build_plan(tables(a=64, b=40, c=24, d=12), mixture, global_batch=8, steps=40)
    plan = plan.with_mixture_phase(MixturePhase(13, {"a": 1.0, "b": 8.0, "c": 2.0, "d": 1.0}))
    rows = rows_of(plan, skipped=(3, 17))
    expected = Counter(source for row in rows if not row["skipped"] for source, _ in plan.batch(row["step"]).rows)
    lost = Counter(source for row in rows if row["skipped"] for source, _ in plan.batch(row["step"]).rows)
    seen = samples_seen(rows, plan.sources)
    assert {name: counts["samples"] for name, counts in seen.items()} == dict(expected)
    assert {name: counts["skipped"] for name, counts in seen.items() if counts["skipped"]} == dict(lost)
    assert seen["b"]["epochs"] == round(expected["b"] / 40, 4)


def test_the_end_of_a_run_says_what_it_was_trained_on() -> None:
    plan = build_plan(tables(a=16, b=40), MixtureConfig(), global_batch=8, steps=6)
    done = {"sources": samples_seen(rows_of(plan, skipped=(0, 1, 2, 3, 4, 5)), plan.sources), "replaced": 0}
    assert _seen(done).startswith("trained on a 0 samples (0.00 epochs, ")
    done = {"sources": samples_seen(rows_of(plan), plan.sources), "replaced": 3}
    samples = counted(plan)
    assert _seen(done) == (
        f"trained on a {samples['a']} samples ({samples['a'] / 16:.2f} epochs),"
        f" b {samples['b']} samples ({samples['b'] / 40:.2f} epochs); 3 bad samples were replaced by others"
    )
