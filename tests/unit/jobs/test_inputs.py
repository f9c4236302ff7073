"""Jobs whose models or data do not exist: refused at once, with setting, value, rule and fix, before Ray starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.runtime.inputs import check_inputs
from jobs.serving.serve import plain_reason
from jobs.spec.load import check, override, read_document
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore
from rzen.model.locate import check_adapter, check_checkpoint
from tests.data import publish
from tests.paths import ROOT
from tests.tiny import tiny_export

NO_MODEL = "is neither a directory nor a hub name; name an existing checkpoint directory"
NO_MANIFEST = "train/manifest.json: there is no such manifest; run a job of kind ingest or index that writes here"
NO_TABLE = "candidates.json: there is no such table; run a job of kind mine, judge, select, cluster or curate"
DATA = ["data.root=data", "data.split=train"]
NO_FOLDER = "does not exist; name the directory of an adapter, or run the job that writes it first"
NO_ADAPTER = "has no adapter_config.json; name the directory of an adapter"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `data`, `reranker`, `adapter`, `empty`, a `file` and a pipeline."""
    root = tmp_path_factory.mktemp("there")
    tiny_export(root)
    publish(LocalStore(root / "data"), {"pairs": ("text_image", 3)})
    shutil.copytree(root / "model", root / "reranker")
    (root / "reranker/rzen.json").write_text(json.dumps({"pair_prompt": {}}))
    (root / "adapter").mkdir()
    (root / "adapter/adapter_config.json").write_text("{}")
    (root / "adapter/adapter_model.safetensors").write_bytes(b"")
    (root / "empty").mkdir()
    (root / "file").write_text("hello")
    jobs = "{first: {spec: jobs/embed.yaml, set: {model: nothing}}, then: {spec: jobs/mine.yaml}}"
    (root / "all.yaml").write_text(f"kind: pipeline\nname: all\nstate: state\njobs: {jobs}\n")
    return root


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("serve", ["model=nothere"], f"model=nothere: {NO_MODEL}"),
        ("serve", ["model=file"], "model=file: is a file; name the directory of a checkpoint"),
        ("serve", ["model=empty"], "model=empty: {root}/empty: has no config.json; name the directory"),
        ("serve", ["model=adapter"], "model=adapter: is an adapter; name it as the adapter, and its base as the model"),
        (
            "serve",
            ["model=reranker"],
            "model=reranker: {root}/reranker/rzen.json: is that of a re-ranker, which has no",
        ),
        ("serve", ["model=rzen/no-such-model"], "model=rzen/no-such-model: is no directory, and the hub does not give"),
        ("serve", ["model=model", "adapter=nothere"], f"adapter=nothere: {{root}}/nothere: {NO_FOLDER}"),
        ("serve", ["model=model", "adapter=model"], f"adapter=model: {NO_ADAPTER}"),
        ("serve", ["model=model", "adapters.a=nothere"], f"adapters.a=nothere: {{root}}/nothere: {NO_FOLDER}"),
        (
            "serve",
            ["model=model", "corpus=empty"],
            "corpus=empty: {root}/empty/vectors.json: does not exist; run a job",
        ),
        ("serve", ["model=model", "reranker=nothere"], f"reranker=nothere: {NO_MODEL}"),
        ("embed", ["model=nothere"], f"model=nothere: {NO_MODEL}"),
        ("embed", ["model=model", "input=nothere"], "input=nothere: does not exist; name a folder of files"),
        ("embed", ["model=model", "input=empty"], "input=empty: holds no files; name a folder of files"),
        ("mine", ["model=model", "data.root=nothere"], f"data.root=nothere: {{root}}/nothere/{NO_MANIFEST}"),
        ("mine", ["model=model", "data.root=file"], "data.root=file: is a file; name a folder"),
        ("judge", ["table=nothere"], f"table=nothere: {{root}}/nothere/{NO_TABLE}"),
        ("select", ["table=file"], "table=file: is a file; name a folder"),
        ("cluster", ["table=empty"], f"table=empty: {{root}}/empty/{NO_TABLE}"),
        ("curate", ["data.root=empty"], f"data.root=empty: {{root}}/empty/{NO_MANIFEST}"),
        ("evaluate", ["data.root=file"], "data.root=file: is a file; name a folder"),
        ("evaluate", [*DATA, "models.before.base=nothere"], f"models.before.base=nothere: {NO_MODEL}"),
        (
            "evaluate_reranker",
            [*DATA, "rerank.tune=null", "models.soup={base: model, adapter: empty}"],
            f"models.soup.adapter=empty: {NO_ADAPTER}",
        ),
        (
            "evaluate_reranker",
            [*DATA, "rerank.tune=null", "models.soup={base: model, adapter: adapter}", "rerank.model={base: nothere}"],
            f"rerank.model.base=nothere: {NO_MODEL}",
        ),
        (
            "evaluate_reranker",
            DATA,
            "rerank.tune.root=runs/validation: {root}/runs/validation/held_out/manifest.json: there is no such",
        ),
        ("export", ["model.base=nothere"], f"model.base=nothere: {NO_MODEL}"),
        ("export", ["model={base: model, adapter: empty}"], f"model.adapter=empty: {NO_ADAPTER}"),
        ("check", ["model=model", "data.root=nothere"], f"data.root=nothere: {{root}}/nothere/{NO_MANIFEST}"),
        (
            "export_data",
            ["data=nothere"],
            "data=nothere: does not exist; name the output of `rzen ingest` or `rzen index`",
        ),
        (
            "search",
            ["vectors=nothere"],
            "vectors=nothere: {root}/nothere/vectors.json: does not exist; run a job of kind",
        ),
        (
            "soup",
            ["models.images.adapter=nothere"],
            "models.balanced.adapter=runs/balanced/adapter: {root}/runs/balanced",
        ),
    ],
)
def test_a_setting_that_names_nothing_is_refused(
    there: Path, monkeypatch: pytest.MonkeyPatch, kind: str, changes: list[str], expected: str
) -> None:
    monkeypatch.chdir(there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = check(override(read_document(f"jobs/{kind}.yaml"), changes))
    with pytest.raises(UserError) as caught:
        check_inputs(spec)
    assert str(caught.value).startswith(expected.format(root=there))


def test_settings_that_name_what_is_there_pass(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    for kind, changes in {
        "serve": ["model=model", "adapter=adapter", "reranker=reranker"],
        "mine": ["model=model", "data.root=data"],
        "export": ["model={base: reranker, adapter: adapter}"],
    }.items():
        check_inputs(check(override(read_document(f"jobs/{kind}.yaml"), changes)))


def test_a_server_on_a_cluster_looks_for_its_own_folders(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_inputs(check(override(read_document("jobs/serve.yaml"), ["model=/models/only-there"])))


def test_a_model_in_a_bucket_is_read_by_its_configuration(there: Path, s3_endpoint: str) -> None:
    url, endpoint = "s3://inputs/models", s3_endpoint
    bucket = open_store(url, endpoint)
    bucket.ensure_bucket()
    with pytest.raises(UserError, match=r"/models: has no config.json; check the URL, or run the job that writes it"):
        check_checkpoint(url, endpoint)
    with pytest.raises(UserError, match=r"/models: has no adapter_config.json"):
        check_adapter(url, endpoint)
    bucket.write("config.json", (there / "model/config.json").read_bytes())
    bucket.write("adapter_config.json", b"{}")
    check_checkpoint(url, endpoint, makes_vectors=True)
    check_adapter(url, endpoint)
    bucket.write("rzen.json", b'{"pair_prompt": {}}')
    with pytest.raises(UserError, match=r"^s3://.*/models/rzen.json: is that of a re-ranker, which has no vectors"):
        check_checkpoint(url, endpoint, makes_vectors=True)


def test_commands_answer_before_ray_starts(there: Path) -> None:
    commands = [
        ["serve", "nothere"],
        ["serve", "--registry", "nothere"],
        ["embed", "model", "data", "out", "--set", "splits=[held_out]"],
        ["index", "nothere.tar", "out"],
        ["search", "a red circle"],
        ["run", "all.yaml"],
    ]
    code = (
        "import json, sys\nfrom jobs.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n    assert main(command) == 1\n"
        "assert 'torch' not in sys.modules\n"
        "print('ray' in sys.modules and sys.modules['ray'].is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=there,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1] for error in errors] == [
        "model=nothere",
        "registry=nothere",
        f"{there}/data/held_out/manifest.json",
        "nothere.tar",
        "runs",
        "model=nothing",
    ]
    assert not any((there / name).exists() for name in ("out", "state"))


def test_a_file_instead_of_a_folder_is_named(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["verify"], ["index-bench"], ["runs"]):
        assert main([*command, str(there / "file")]) == 1
        assert capsys.readouterr().err == f"error: {there}/file: is a file; name a folder\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pipelines.errors.UserError: model: has no weights; copy it", "model: has no weights; copy it"),
        ("ray::ServeReplica:rzen:ModelReplica.initialize() UserError: a: b", "a: b"),
        ("RuntimeError: out of memory", "RuntimeError: out of memory"),
    ],
)
def test_a_reason_of_ray_serve_is_told_without_the_name_of_our_class(message: str, expected: str) -> None:
    assert plain_reason(["Traceback", f"  {message}  ", "at line 3"]) == expected
