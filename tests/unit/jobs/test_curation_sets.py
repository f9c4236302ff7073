"""Which evaluation sets a curation compares with, and what it takes of them."""

import json
from pathlib import Path

import pytest

from jobs.curation.evaluation_sets import find_evaluation_sets
from jobs.curation.specs import CurateSpec
from jobs.spec.no_effect import unused_settings
from pipelines.config import DataConfig
from pipelines.curate.features import FileInputs
from pipelines.curate.settings import LeakageRule
from pipelines.errors import UserError
from tests.curation import publish


def custom_dataset(folder: Path) -> str:
    """One query, two candidates, one of them relevant."""
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": "right", "text": "right"}, {"_id": "wrong", "text": "wrong"}]
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "asked"}))
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tright\t1\n")
    return str(folder)


def names(rule: LeakageRule, data: DataConfig) -> list[tuple[str, int]]:
    return [(some.name, some.num_inputs) for some in find_evaluation_sets(rule, data)]


def test_held_out_splits_are_compared_if_they_are_there(tmp_path: Path) -> None:
    publish(tmp_path / "one", {"a": [("q", "t")] * 3})
    publish(tmp_path / "two", {"a": [("q", "t")] * 3})
    publish(tmp_path / "two", {"a": [("q", "t")] * 2}, "held_out")
    one, two = (DataConfig(root=str(tmp_path / name / "data")) for name in ("one", "two"))
    assert names(LeakageRule(), one) == []
    assert names(LeakageRule(), two) == [("held_out of the data", 4)]
    assert names(LeakageRule(held_out=False), two) == []
    assert names(LeakageRule(data=[two.root]), one) == [(two.root, 4)]
    # The held-out split itself is not compared with itself.
    assert names(LeakageRule(), two.model_copy(update={"split": "held_out"})) == []
    with pytest.raises(UserError, match="there is no such manifest"):
        names(LeakageRule(data=[one.root]), two)


def test_candidates_of_a_custom_dataset(tmp_path: Path) -> None:
    publish(tmp_path, {"a": [("q", "t")]})
    data = DataConfig(root=str(tmp_path / "data"))
    custom = {"mine": custom_dataset(tmp_path / "mine")}
    assert names(LeakageRule(custom=custom), data) == [("mine", 3)]
    (some,) = find_evaluation_sets(LeakageRule(custom=custom, candidates="relevant"), data)
    items = [item.name for inputs in some.inputs if isinstance(inputs, FileInputs) for item in inputs.items]
    assert sorted(items) == ["q", "right"]


def test_a_suite_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    publish(tmp_path, {"a": [("q", "t")]})
    data = DataConfig(root=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"rules\.leakage\.suites: no dataset is there; the first lacks: .*fetch"):
        names(LeakageRule(suites={"MMEB-V2": str(tmp_path / "mmeb")}), data)
    with pytest.raises(UserError, match=r"rules\.leakage\.datasets: 'nowhere' is in none of the suites"):
        names(LeakageRule(suites={"M-BEIR": str(tmp_path / "mbeir")}, datasets=["nowhere"]), data)


def test_settings_of_a_model_without_a_rule_have_no_effect() -> None:
    fields = {"kind": "curate", "data": {"root": "d"}, "out": "o", "model": "m", "actors": 2}
    assert {".".join(found.key) for found in unused_settings(CurateSpec.model_validate(fields))} == {"model", "actors"}
    fields |= {"rules": {"semantic": {}}}
    assert not unused_settings(CurateSpec.model_validate(fields))
