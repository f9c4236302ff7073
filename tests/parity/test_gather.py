"""Workers that gather against one process on the concatenated batch: loss, embedding and parameter gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rzen.config import FalseNegativeConfig, ObjectiveConfig, TemperatureConfig
from rzen.objective.batch import Batch, Mined
from rzen.objective.gather import gather_ids, gather_with_gradient
from rzen.objective.loss import Objective
from tests.gloo import run_workers

ROWS, NEGATIVES, INPUT, WIDTH = 12, 6, 7, 5
FAULTS = (
    "gather detached",
    "gradient averaged in the gather",
    "positives of rank 0",
    "loss times ranks",
    "queries of rank 0",
    "mined ids of this rank",
)
CONFIG = ObjectiveConfig(
    false_negatives=FalseNegativeConfig(threshold=0.5, warmup_steps=0, max_dropped_fraction=0.25),
    temperature=TemperatureConfig(initial=0.1),
)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "queries": normal(ROWS, INPUT),
        "targets": normal(ROWS, INPUT),
        "negatives": normal(NEGATIVES, INPUT),
        "ids": torch.tensor([0, 1, 2, 3, 0, 5, 6, 3, 8, 9, 10, 0]),  # duplicates within and across ranks
        "query ids": torch.tensor([20, 21, 22, 20, 24, 25, 8, 27, 28, 21, 30, 31]),  # equal across ranks; one a target
        "mined ids": torch.tensor([40, 1, 42, 20, 9, 45]),  # targets and a query, mostly of other ranks
        "encoder": normal(INPUT, WIDTH),
    }


def one_step(part: dict[str, Tensor], rank: int, fault: str = "") -> dict[str, Tensor]:
    """Loss and gradients of a linear encoder, of its outputs and of theta, for the rows of one rank."""
    encoder = part["encoder"].clone().requires_grad_()
    queries, targets, negatives = (
        torch.nn.functional.normalize(part[input] @ encoder, dim=-1) for input in ("queries", "targets", "negatives")
    )
    for embeddings in (queries, targets, negatives):
        embeddings.retain_grad()
    objective = Objective(CONFIG, ["a", "b"]).double()
    gathered = gather_with_gradient(targets)
    offset = rank * len(targets)
    if fault == "gather detached":  # the usual mistake: only the own rows keep their gradient
        gathered = torch.cat([gathered[:offset].detach(), targets, gathered[offset + len(targets) :].detach()])
    if fault == "gradient averaged in the gather":  # data parallelism averages already
        share = 1 / dist.get_world_size()
        gathered = share * gathered + (1 - share) * gathered.detach()
    query_ids, mined_ids = gather_ids(part["query ids"]), gather_ids(part["mined ids"])
    if fault == "queries of rank 0":  # every rank takes the first rows for its own
        query_ids = query_ids.roll(offset)
    if fault == "mined ids of this rank":
        mined_ids = part["mined ids"].repeat(dist.get_world_size())
    loss, stats = objective(
        Batch(
            queries,
            gathered,
            "b",
            positive_offset=0 if fault == "positives of rank 0" else offset,
            mined=Mined(gather_with_gradient(negatives), torch.zeros(NEGATIVES, dtype=torch.int64), ids=mined_ids),
            target_ids=gather_ids(part["ids"]),
            query_ids=query_ids,
        ),
        step=0,
    )
    assert stats["dropped_fraction"] > 0.02
    if fault == "loss times ranks":
        loss = loss * dist.get_world_size()
    loss.backward()
    return {
        "loss": loss.detach(),
        "queries": queries.grad,
        "targets": targets.grad,
        "negatives": negatives.grad,
        "encoder": encoder.grad,
        "theta": objective.theta_T.grad,
    }


def worker(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """One step per fault and without; parameter gradients are averaged as data parallelism does."""
    whole = inputs()
    part = {name: rows.chunk(world_size)[rank] if name != "encoder" else rows for name, rows in whole.items()}
    results = {}
    for fault in ("", *FAULTS):
        result = one_step(part, rank, fault)
        for name in ("loss", "encoder", "theta"):
            dist.all_reduce(result[name])
            result[name] /= world_size
        results[fault] = result
    return results


def relative_errors(workers: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each quantity, relative to its largest entry. Embedding gradients are of the mean over ranks."""
    found = {name: workers[0][name] for name in ("loss", "encoder", "theta")}
    for input in ("queries", "targets", "negatives"):
        found[input] = torch.cat([result[input] for result in workers]) / len(workers)
    return {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_equal_one_process(world_size: int) -> None:
    expected = one_step(inputs(), rank=0)
    results = run_workers(worker, world_size)
    errors = relative_errors([result[""] for result in results], expected)
    assert max(errors.values()) < 1e-12, errors
    if world_size > 1:
        detached = relative_errors([result["gather detached"] for result in results], expected)
        assert detached["loss"] < 1e-12  # invisible in the loss curve
        assert min(detached["targets"], detached["encoder"]) > 0.05
        averaged = relative_errors([result["gradient averaged in the gather"] for result in results], expected)
        assert averaged["loss"] < 1e-12
        assert min(averaged["targets"], averaged["encoder"]) > 0.05
        misplaced = relative_errors([result["positives of rank 0"] for result in results], expected)
        assert min(misplaced["queries"], misplaced["encoder"]) > 0.05
        scaled = relative_errors([result["loss times ranks"] for result in results], expected)
        assert min(scaled["encoder"], scaled["theta"]) > 0.5
        for fault in ("queries of rank 0", "mined ids of this rank"):
            errors = relative_errors([result[fault] for result in results], expected)
            assert min(errors["loss"], errors["encoder"]) > 1e-3, (fault, errors)


def gather_unequal(rank: int, _world_size: int) -> Any:
    order = gather_ids(torch.tensor([10 * rank, 10 * rank + 1]))
    messages = []
    for gather, rows in ((gather_with_gradient, torch.zeros(4 - rank, 3)), (gather_ids, torch.arange(4 - rank))):
        try:
            gather(rows)
        except ValueError as error:
            messages.append(str(error))
    return order.tolist(), messages


def test_rank_order_and_unequal_batches() -> None:
    message = "ranks must hold equally many rows, found [4, 3] on ranks 0 to 1"
    assert run_workers(gather_unequal, 2) == [([0, 1, 10, 11], [message, message])] * 2


def test_without_a_process_group_it_is_the_identity() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    assert gather_with_gradient(rows) is rows
    assert gather_ids(torch.tensor([4, 5])).tolist() == [4, 5]
