"""Benchmarks that need another machine still run, count right, and give their peers the same task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rzen.config import ObjectiveConfig, PairPromptConfig, ReadoutConfig
from rzen.inputs.processor import EncodedBatch
from rzen.model.chunks import Indices, chunks_of
from rzen.model.embedding_model import EmbeddingModel
from rzen.objective.loss import Objective
from rzen.training.step import EmbeddingLearner
from tests.benchmarks import contenders, demo, flops, padding, plain, rerank, serve, serve_peer, soup, synthetic, vision
from tests.benchmarks.turns import ROOT

TINY = synthetic.SHAPES["tiny"]
PAIRS = synthetic.mixed(5, TINY.shrink)
# What a machine with a GPU need not have. None in place of a module: it cannot be imported.
ABSENT = ["ray", "deepspeed", "pyarrow", "boto3", "av", "pymupdf", "pypdfium2", "webdataset", "matplotlib", "rich"]
GLANCE = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = ["gpu", "--turns", "1", "--size", "0.04", "--cases", "mixed", "--chunk-tokens", "3200"]
runpy.run_module("tests.benchmarks.gpu", run_name="__main__")
"""


def pairs_of(model: Any) -> Any:
    return synthetic.collate(synthetic.encode(PAIRS, model.config))


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_ray_and_deepspeed() -> None:
    command = [sys.executable, "-c", GLANCE.format(absent=ABSENT)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "These numbers mean nothing" in found.stdout
    assert found.stdout.count("| transformers + PEFT, largest batch that fits |") == 1
    assert "## mixed: where the time goes" in found.stdout


def test_contents_have_the_tokens_that_they_say() -> None:
    pairs = synthetic.encode(PAIRS, TINY.config)
    for (query, target), pair in zip(PAIRS, pairs, strict=True):
        assert pair.queries.lengths.tolist() == [query.num_tokens]
        assert pair.targets.lengths.tolist() == [target.num_tokens]
    assert len({bytes(pair.targets.input_ids) for pair in pairs}) == len(pairs)


def test_the_plain_loop_has_the_same_vectors() -> None:
    model = synthetic.build(TINY, "cpu", "sdpa")
    targets = pairs_of(model).targets
    with torch.no_grad():
        ours = EmbeddingModel(model, synthetic.LAYOUT)(targets)
        plain.use_plain_vision(model, "sdpa")
        torch.testing.assert_close(
            plain.vectors(model, plain.library_inputs(targets, model.config)), ours, rtol=0, atol=1e-5
        )
    assert float((ours - ours[:1]).norm(dim=1)[1:].min()) > 0.1


@pytest.mark.parametrize(("chunk_tokens", "checkpointing"), [(None, False), (200, True)], ids=["once", "repeated"])
def test_operations_are_those_that_torch_counts(chunk_tokens: int | None, checkpointing: bool) -> None:
    """Torch knows no causal attention. Checkpointing stops early in each block, which the formula leaves out."""
    model = synthetic.build(TINY, "cpu", "eager", checkpointing=True)
    if not checkpointing:
        model.gradient_checkpointing_disable()
    embedder = EmbeddingModel(model, synthetic.LAYOUT, ReadoutConfig(direction="bidirectional"))
    learner = EmbeddingLearner(embedder, Objective(ObjectiveConfig(), ["t"]), chunk_tokens)
    pairs = pairs_of(model)
    inputs = EncodedBatch.concat([pairs.queries, pairs.targets])
    chunks: list[Indices] = np.split(np.arange(len(inputs)), 2)
    if chunk_tokens is not None:
        chunks = chunks_of(inputs.lengths, chunk_tokens, packed=False)
        assert len(chunks) > 2
    with FlopCounterMode(display=False) as counter:
        learner.train()(pairs, [("t", len(pairs))], 1000)[0].backward()
    expected = flops.computed(model, inputs, chunks, packed=False, causal=False)
    counted = expected.step(cached=chunk_tokens is not None, checkpointing=checkpointing)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02 if checkpointing else 1e-4)
    whole = flops.needed(model, inputs, causal=False).step()
    alone = [np.array([input]) for input in range(len(inputs))]
    assert whole == pytest.approx(flops.computed(model, inputs, alone, packed=False, causal=False).step())
    assert whole < counted


def test_the_padding_benchmark_runs() -> None:
    found = padding.report(padding.arguments(["--pairs", "4", "--turns", "1"]))
    assert "| whole | all | 2 | 51.1% |" in found
    assert "| packed | 4,096 | 171 | 0.0% |" in found
    assert found.count("| grouped | ") == 5


def test_the_rerank_benchmark_runs_and_compares_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    options = rerank.arguments(["--queries", "3", "--candidates", "2", "--top-k", "2", "--turns", "1"])
    monkeypatch.setattr(rerank, "PROMPT", PairPromptConfig(max_visual_tokens=4))
    found = rerank.report(options)  # which compares the scores of all ways
    assert [line.split(" | ")[0] for line in found.splitlines()[-3:]] == [f"| {way}" for way in WAYS]
    assert "an image is in 3.0 pairs in the mean" in found
    monkeypatch.setattr(rerank, "TOLERANCE", {"cpu": 0.0})
    with pytest.raises(AssertionError, match="sentence-transformers"):
        rerank.report(options)


WAYS = ("ungrouped", "grouped", "sentence-transformers")


@pytest.mark.slow
@pytest.mark.long
def test_the_vision_benchmark_runs() -> None:
    options = vision.arguments(["--images", "1", "--turns", "1"])
    (tiny, *_, both) = vision.times("tiny", options)  # which compares the vectors of all ways
    assert "| tiny | 2 | transformers | 1.00 |" in tiny
    assert "| both |" in both


def test_the_soup_benchmark_runs_and_tells_right_from_wrong() -> None:
    # In this process, because each new one imports torch and PEFT. Its time and memory mean nothing here.
    found = soup.report(soup.arguments(["--blocks", "1", "--turns", "1"]), soup.measure)
    cells = [line.strip("| ").split(" | ") for line in found.splitlines() if line.startswith("| ")]
    errors = {row[0]: float(row[-1]) for row in cells[1:]}
    assert list(errors) == list(soup.WAYS.values())
    exact, cut, by_peft, plainly = errors.values()
    assert max(exact, by_peft) < 1e-6
    assert 0.6 < cut < plainly


def test_the_cost_of_a_run_counts_all_processes_below_it() -> None:
    """A child of a child works for a second and holds 64 MB."""
    work = """
import time
held = bytearray(64 << 20)
while time.process_time() < 1:
    pass
time.sleep(3)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    cpu_s, peak = demo.watch(subprocess.Popen([sys.executable, "-c", parent]))
    assert 0.9 < cpu_s < 3
    assert peak > 64 << 20


def test_the_table_of_the_demo_has_every_seed_and_the_mean_of_the_four_tasks() -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        return [
            {"model": model, "task": task, "pool": pool, "metric": metric, "value": value + number / 10}
            for model in ("stage1", "soup")
            for number, task in enumerate(demo.TASKS)
            for pool, metric in (
                ("task", "hit@1"),
                ("task", "ndcg@5"),
                ("mixed", "hit@1"),
                ("mixed", "asked_modality@1"),
                ("mixed", "routed_hit@1"),
            )
        ]

    cost = demo.Cost(6.25, 600.4, 3.21)
    text = demo.table({0: (cost, rows(0.1)), 2: (cost, rows(0.3))})
    assert "| 0 | stage 1 | 10.0 | 20.0 | 30.0 | 40.0 | 25.0 | 25.0 | 25.0 | 25.0 |" in text
    assert "| 2 | soup | 30.0 | 40.0 | 50.0 | 60.0 | 45.0 | 45.0 | 45.0 | 45.0 |" in text
    assert "The mean of the soup is 25.0 to 45.0 over the seeds." in text
    assert "| 2 | 6.2 | 600 | 3.2 |" in text


def test_a_feed_is_measured_between_its_warm_up_and_the_end_of_its_first_consumer() -> None:
    run = contenders.Run("bare", "", "images", warm_s=1.0, measured_s=2.0)
    # The second consumer gets a burst at the end, when the first one has stopped.
    first = [contenders.Delivered(10.0 + 0.5 * n, 100.0 + n, 32) for n in range(8)]
    second = [contenders.Delivered(10.25 + n, 100.5 + 2 * n, 32) for n in range(3)]
    second += [contenders.Delivered(14.0, 130.0, 32)] * 9
    found = contenders.result(run, contenders.Delivered(7.0, 90.0, 0), [first, second])
    assert (found.first_batch_s, found.first_batch_cpu_s) == (3.0, 10.0)
    # From 11.0 to 13.5 s: 11.25, 11.5, 12, 12.25, 12.5, 13 and 13.5.
    assert (found.samples, found.wall_s, found.cpu_s) == (7 * 32, 2.5, 5.0)
    with pytest.raises(RuntimeError, match=r"bare gave batches for 1\.0 s only"):
        contenders.result(run, first[0], [first[:3]])


def test_each_report_of_the_server_replaces_its_own_section(tmp_path: Path) -> None:
    path = tmp_path / "serve.md"
    path.write_text("# Load\n\nold\n")
    serve.write_section(path, f"{serve_peer.TITLE}\n\nfirst\n")
    serve.write_section(path, "# Load\n\nnew\n")
    assert path.read_text() == f"# Load\n\nnew\n\n{serve_peer.TITLE}\n\nfirst\n"
    serve.write_section(path, f"{serve_peer.TITLE}\n\nsecond\n")
    assert path.read_text() == f"# Load\n\nnew\n\n{serve_peer.TITLE}\n\nsecond\n"


def test_cpu_seconds_of_a_server_are_those_of_all_its_processes() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, burn]  # a child of the process that is asked about
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        assert 0.4 < serve_peer.cpu_seconds(process.pid) < 2
        process.stdin.close()
