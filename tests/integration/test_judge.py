"""Job of kind `judge` on a cluster: any number of actors, and a kill, give the same bytes as one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.judging import judge
from pipelines.candidates.types import MANIFEST
from tests.judging import by_model, make_table, run_judges_here, spec_of, table_files
from tests.kills import run_until_a_part_is_stored
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_two_actors_and_a_killed_job_write_the_bytes_of_one_process(ray_cluster: None, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    make_table(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        run_judges_here(patch)
        judge.run(spec_of(tmp_path, tmp_path / "here", by_model(model)))
    spec = spec_of(tmp_path, tmp_path / "cluster", by_model(model), actors=2)
    (tmp_path / "judge.json").write_text(spec.model_dump_json())
    run_until_a_part_is_stored(tmp_path / "judge.json", tmp_path / "cluster", "scores/*/*/*.ids")
    assert not (tmp_path / "cluster" / MANIFEST).exists()
    judge.run(spec)
    assert table_files(tmp_path / "cluster") == table_files(tmp_path / "here")
