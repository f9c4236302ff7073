"""Pairs with a relevance, from a list in a folder to a model that orders them."""

import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_cluster")]
STAGE1 = str(ROOT / "jobs/stage1.yaml")
STEPS = 30
COLOURS = ("red", "green", "blue", "grey", "pink", "brown")


def pairs() -> list[dict[str, object]]:
    """Each colour with each: 3.5 for itself, less the further they are apart in the list."""
    return [
        {"query": f"a {one} thing", "positive": f"something {other}, number {i}", "relevance": 3.5 - abs(i - k)}
        for i, one in enumerate(COLOURS)
        for k, other in enumerate(COLOURS)
    ]


def train(folder: Path, listed: list[dict[str, object]]) -> int:
    """Ingest the list, and train on it from random weights; the exit status of the training."""
    (folder / "raw").mkdir()
    (folder / "raw/captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    assert main(["ingest", str(folder / "raw"), str(folder / "data"), "--set", "held_out_fraction=0"]) == 0
    changes = {
        "name": "own",
        "run.root": str(folder / "runs"),
        "data": f"{{root: {folder / 'data'}}}",
        "model.backbone": "{hidden: 32, layers: 1}",
        "model.tune": "full",
        "model.dtype": "float32",
        "model.gradient_checkpointing": "false",
        "optim.lr": "3e-3",
        "global_batch": "36",
        "steps": str(STEPS),
        "cluster": "{workers: 2, cpus_per_worker: 0.5, gpus_per_worker: 0}",
    }
    return main(["run", STAGE1, *(word for name in changes for word in ("--set", f"{name}={changes[name]}"))])


def test_graded_pairs_are_put_in_their_order(tmp_path: Path) -> None:
    assert train(tmp_path, pairs()) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    assert rows[0]["accuracy"] < 0.9 < rows[-1]["accuracy"]  # of pairs of pairs, 0.5 by chance


def test_pairs_with_a_relevance_among_pairs_without_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = pairs()
    for line in listed[::6]:
        del line["relevance"]
    assert train(tmp_path, listed) == 1
    told = capsys.readouterr()
    assert "30 of 36 pairs that are contrasted have a relevance, the others have none" in told.out + told.err
