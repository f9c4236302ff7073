import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.spec.load import check, override, read_document, substitute
from jobs.sweeps.specs import FinetunesSpec
from jobs.training.specs import TrainSpec
from jobs.workflows.pipeline import named, resolve_jobs
from pipelines.errors import UserError
from rzen.config import TinyBackbone
from tests.paths import ROOT

SHIPPED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").rglob("*.yaml"))
MINIMAL = """\
kind: train
name: small
data:
  root: data
model:
  backbone: some/model
"""


def written(folder: Path, text: str, name: str = "job.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def load(path: str, *overrides: str) -> TrainSpec:
    spec = check(override(read_document(path), overrides))
    assert isinstance(spec, TrainSpec)
    return spec


def complaint(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return str(caught.value)


@pytest.fixture(scope="module")
def validated() -> dict[str, tuple[int, list[str]]]:
    """Exit status of `rzen validate` for each shipped spec, and the heavy libraries that were loaded by then."""
    code = (
        "import json, sys; from jobs.cli import main; found = {}\n"
        "for path in sys.argv[1:]:\n"
        "    status = main(['validate', path])\n"
        "    found[path] = status, sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules))\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code, *SHIPPED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_spec_is_valid_executable_and_quick_to_check(
    path: str, validated: dict[str, tuple[int, list[str]]]
) -> None:
    assert validated[path] == [0, []]
    first = (ROOT / path).read_text().splitlines()[0]
    assert first == "#!/usr/bin/env -S python -m jobs.run"
    assert (ROOT / path).stat().st_mode & 0o111


def test_shipped_stages_carry_the_numbers_of_the_paper() -> None:
    for name in ("stage1", "stage2"):
        spec = load(str(ROOT / f"jobs/{name}.yaml"))
        assert (spec.model.backbone, spec.model.lora.rank, spec.model.prompt.max_visual_tokens) == (
            "Qwen/Qwen2-VL-2B-Instruct",
            64,
            1280,
        )
        assert (spec.optim.lr, spec.optim.weight_decay, spec.global_batch, spec.epochs) == (2e-4, 0.05, 768, 1.0)
    stage1, stage2 = (load(str(ROOT / f"jobs/stage{number}.yaml")) for number in (1, 2))
    assert (stage1.objective.hardness, stage1.objective.false_negatives, stage1.data.instructions) == (
        None,
        None,
        False,
    )
    assert stage2.objective.false_negatives is not None
    assert stage2.objective.hardness is not None
    assert (stage2.objective.hardness.alpha, stage2.objective.false_negatives.threshold) == (9.0, 0.95)
    assert (stage2.data.instructions, stage2.data.mixture.max_samples_per_source) == (True, 100_000)


def test_set_goes_on_top_and_its_values_are_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    spec = load(
        path, "optim.lr=2e-3", "model.backbone={hidden: 32}", "model.tune=full", "steps=7", "data.root=s3://b/x"
    )
    assert (spec.optim.lr, spec.steps, spec.data.root) == (0.002, 7, "s3://b/x")
    assert isinstance(spec.model.backbone, TinyBackbone)
    assert (spec.model.backbone.hidden, spec.optim.weight_decay) == (32, 0.05)


def test_later_set_wins(tmp_path: Path) -> None:
    assert load(written(tmp_path, MINIMAL), "seed=1", "seed=2").seed == 2


def test_base_is_merged_under_a_file_that_knows_where_its_own_lines_are(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL + "optim:\n  lr: 1e-3\n  weight_decay: 0.1\n", "below.yaml")
    path = written(tmp_path, "base: below.yaml\nname: above\noptim:\n  lr: 5e-3\n")
    spec = load(path)
    assert (spec.name, spec.optim.lr, spec.optim.weight_decay) == ("above", 0.005, 0.1)
    wrong = written(tmp_path, "base: below.yaml\noptim:\n  lr: -1\n", "wrong.yaml")
    assert complaint(wrong).startswith(f"{wrong}:3: optim.lr=-1: input should be greater than 0")


def test_files_that_a_base_names_are_next_to_it(tmp_path: Path) -> None:
    """The file on top of it may have the name of one of them, as `mine.yaml` on top of `jobs/ablation.yaml`."""
    for folder in ("base", "own"):
        (tmp_path / folder).mkdir()
        for name in ("one", "two"):
            text = f"kind: ingest\ninput: {folder}\nout: {name}\n"
            (tmp_path / folder / f"{name}.yaml").write_text(text)
    jobs = "jobs:\n  one: {spec: one.yaml}\n  two: {spec: two.yaml}\n"
    (tmp_path / "base/all.yaml").write_text(f"kind: pipeline\nname: all\nstate: state\n{jobs}")
    (tmp_path / "middle.yaml").write_text("base: base/all.yaml\n")
    (tmp_path / "own/top.yaml").write_text("base: ../middle.yaml\njobs:\n  two: {spec: two.yaml}\n")
    document = read_document(tmp_path / "own/top.yaml")
    found = {name: job.model_dump()["input"] for name, (job, _) in resolve_jobs(check(document), document).items()}
    assert found == {"one": "base", "two": "own"}


def test_files_that_a_pipeline_names_for_a_job_are_next_to_the_pipeline(tmp_path: Path) -> None:
    """A pipeline may give a job of another folder a file of its own, with the name of a shipped one."""
    (tmp_path / "mine.yaml").write_text("base: jobs/stage2.yaml\nseed: 7\n")
    (tmp_path / "all.yaml").write_text(
        "kind: pipeline\nname: all\nstate: state\n"
        "jobs:\n  tunes: {spec: jobs/finetunes.yaml, set: {stage: mine.yaml, runs: {a: null}}}\n"
    )
    document = read_document(tmp_path / "all.yaml")
    trained = [spec for spec in named(check(document), document) if isinstance(spec, TrainSpec)]
    assert trained
    assert {spec.seed for spec in trained} == {7}


def test_base_on_itself_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "base: b.yaml\n", "a.yaml")
    written(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "is based on itself" in complaint(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optimm: {}\n", "{path}:7: optimm is not a setting; did you mean 'optim'?"),
        ("steps: 1.5\n", "{path}:7: steps=1.5: input should be a valid integer"),
        ("steps: '7'\n", "{path}:7: steps='7': input should be a valid integer"),
        ("global_batch: 1\n", "{path}:7: global_batch=1: input should be greater than or equal to 2"),
        ("name: a/b\n", "{path}:7: 'name' is given twice; keep one of them"),
        ("optim:\n  lr: quick\n", "{path}:8: optim.lr='quick': input should be a valid number"),
        ("optim:\n  zero_stage: 4\n", "{path}:8: optim.zero_stage=4: input should be 1, 2 or 3"),
        ("objective:\n  temperature: {initial: 0.9}\n", "{path}:8: objective.temperature: initial=0.9 must lie in"),
        ("init_adapter: x\nmodel:\n  tune: full\n", "{path}:8: 'model' is given twice"),
        ("x: [\n", "{path}:8: is not YAML"),
    ],
)
def test_mistakes_are_told_with_line_key_value_and_rule(tmp_path: Path, change: str, expected: str) -> None:
    path = written(tmp_path, MINIMAL + change)
    assert complaint(path).startswith(expected.format(path=path))


def test_every_mistake_gets_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL.replace("root: data", "rot: data") + "steps: 0\n")
    assert complaint(path).splitlines() == [
        f"{path}:3: data.root is missing; add it",
        f"{path}:4: data.rot is not a setting; did you mean 'root'?",
        f"{path}:7: steps=0: input should be greater than or equal to 1; rzen schema train documents it",
    ]


@pytest.mark.parametrize(
    ("spec", "override_", "rule"),
    [
        ("evaluate_reranker", "rerank.model=nothere", "a mapping with base, adapter, prompt, dtype"),
        (
            "evaluate_reranker",
            "rerank=[1]",
            "a mapping with model, top_k, weights, tune, tune_tasks, tune_queries,",
        ),
        ("evaluate", "models.a=runs/model", "a mapping with base, adapter, instructions"),
        ("evaluate", "custom=runs/mine", "a mapping of names to string"),
        ("judge", "model=nothere", "a mapping with base, adapter, prompt, dtype or null"),
        ("mine", "pools=some", '"own" or "all" or a list of mapping with at least 1 entries'),
        ("stage1", "model.backbone=7", "a string or a mapping with family, hidden, layers, heads, vision_width,"),
        ("stage1", "cluster.chunk_tokens=many", 'an integer >= 1 or "auto" or null'),
        (
            "soup",
            "soups.uniform=mean",
            "a mapping with weights, rank, method, evaluations, at_once, seed, density, signs",
        ),
    ],
)
def test_a_value_of_a_wrong_type_is_told_all_that_it_may_be(spec: str, override_: str, rule: str) -> None:
    value = override_.partition("=")[2]
    with pytest.raises(UserError) as caught:
        check(override(read_document(f"jobs/{spec}.yaml"), [override_]))
    assert f"={value if value in ('7', '[1]') else repr(value)}: must be {rule}" in str(caught.value)


@pytest.mark.parametrize(
    ("override_", "expected"),
    [
        ("optim.lrr=1", "--set optim.lrr=1: optim.lrr is not a setting; did you mean 'lr'?"),
        ("steps", "--set steps: is not of the form key=value"),
        ("a..b=1", "--set a..b=1: is not of the form key=value"),
        ("model.backbone={hiden: 3}", "--set model.backbone={hiden: 3}: model.backbone.hiden is not a setting"),
    ],
)
def test_mistakes_on_the_command_line_name_it(tmp_path: Path, override_: str, expected: str) -> None:
    assert complaint(written(tmp_path, MINIMAL), override_).startswith(expected)


def test_weights_of_four_bits_are_not_spread(tmp_path: Path) -> None:
    told = complaint(written(tmp_path, MINIMAL), "model.quantize=nf4", "optim.zero_stage=3")
    assert "model.quantize=nf4 works with optim.zero_stage 1 and 2 only" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: trian\n", "kind='trian' is not a kind of job"),
        ("a: 1\n", "has no `kind`"),
        ("- 1\n", "is not a mapping"),
    ],
)
def test_what_is_no_job_says_so(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(written(tmp_path, text))


def test_missing_file_names_the_shipped_ones() -> None:
    assert "no such file; name a spec of your own, or one of jobs/ablation.yaml" in complaint("nowhere/job.yaml")


def test_variables_are_put_in_and_keep_their_type() -> None:
    data = {"a": "${out}/x", "b": ["${n}"], "c": 1}
    assert substitute(data, {"out": "runs", "n": 3}, "p") == {"a": "runs/x", "b": [3], "c": 1}
    with pytest.raises(UserError, match=r"p: '\$\{no\}': there is no variable 'no'; vars has out"):
        substitute("${no}", {"out": 1}, "p")


def test_null_takes_an_entry_out_of_named_ones(tmp_path: Path) -> None:
    written(tmp_path, "kind: finetunes\nstage: s.yaml\nout: o\nruns: {a: {seed: 1}, b: {seed: 2}}\n", "below.yaml")
    spec = check(read_document(written(tmp_path, "base: below.yaml\nruns: {a: null, c: {}}\n")))
    assert isinstance(spec, FinetunesSpec)
    assert spec.runs == {"b": {"seed": 2}, "c": {}}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("positive: {image: jpg}", "sources.s.positive.image is not a setting; known here: text, media"),
        ("negatives: [{texts: txt}]", "sources.s.negatives.0.texts is not a setting; did you mean 'text'?"),
    ],
)
def test_settings_of_named_entries_and_lists_are_listed(tmp_path: Path, mapping: str, message: str) -> None:
    spec = tmp_path / "index.yaml"
    spec.write_text(f"kind: index\nsources: {{s: {{urls: [a.tar], {mapping}}}}}\nout: data\n")
    with pytest.raises(UserError) as caught:
        check(read_document(str(spec)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "neither model nor registry is set"),
        ({"model": "m", "registry": "r"}, "model and registry exclude each other"),
        ({"registry": "r", "corpus": "c"}, "corpus and registry exclude each other"),
        ({"registry": "r", "adapters": {"a": "b"}}, "adapters needs a model that stays the same"),
        ({"model": "m", "adapter": "a", "adapters": {"a": "b"}}, "adapters needs a model"),
        ({"model": "m", "replicas": 3, "max_replicas": 2}, "max_replicas=2 is less than replicas=3"),
        ({"model": "m", "host": "0.0.0.0"}, "host=0.0.0.0 lets other machines ask without a key"),
    ],
)
def test_servers_that_cannot_work_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.delenv("RZEN_API_KEYS", raising=False)
    path = written(tmp_path, yaml.safe_dump({"kind": "serve"} | changes))
    with pytest.raises(UserError, match=told):
        check(read_document(path))
