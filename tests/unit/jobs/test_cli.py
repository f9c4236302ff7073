import io
import json
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from jobs.cli import main
from jobs.commands import data, models, new
from jobs.commands.options import as_changes, read_spec
from jobs.data.specs import IndexSpec
from jobs.runtime import progress, stop_jobs
from jobs.runtime.local_s3 import free_port
from jobs.runtime.progress import Bars, Progress, RunTable, duration
from jobs.spec.kinds import kind_names
from jobs.workflows.registry import Registry
from pipelines import samples
from pipelines.errors import UserError
from pipelines.formats.format import FormatName
from pipelines.storage.location import open_store
from rzen.export.formats import FORMATS, ExportFormat
from rzen.index.kinds import INDEX_KINDS
from tests.data import publish
from tests.paths import ROOT
from tests.specs import evaluate


def test_help_teaches_the_road(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in (
        "validate",
        "run",
        "submit",
        "ingest",
        "index",
        "verify",
        "search",
        "rzen run jobs/demo.yaml",
        "--set",
    ):
        assert word in out


def test_choices_of_options_are_those_of_the_registries(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*data.Split] == [*get_args(samples.Split)]
    assert [*data.DataFormat] == [*get_args(FormatName)]
    assert {*models.Modality} == {*samples.MODALITIES}
    assert [*models.Index] == ["auto", *INDEX_KINDS]
    assert [*FORMATS] == [*get_args(ExportFormat)]
    assert main(["export", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--format <model|adapter|rzen_release|reranker>" in out
    assert "reranker: of a re-ranker, for transformers" in out


@pytest.mark.parametrize(("arguments", "listed"), [([], "validate"), (["registry"], "rollback")])
def test_a_group_without_a_command_prints_its_help(
    arguments: list[str], listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: rzen")
    assert f"\n  {listed} " in out
    assert err == ""


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["search"]])
def test_wrong_command_line_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage: rzen" in capsys.readouterr().err.lower()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["vaildate", "x.yaml"], "no such command 'vaildate'; did you mean 'validate'?"),
        (["registry", "shwo"], "no such command 'shwo'; did you mean 'show'?"),
        (["jobs/stage2.yaml"], "no such command 'jobs/stage2.yaml'; did you mean `rzen run jobs/stage2.yaml`?"),
        (["fly"], "no such command 'fly'; use one of new, validate, plan, run, submit, "),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert answer in capsys.readouterr().err


def test_a_mistyped_spec_is_answered_with_the_nearest_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures.yaml").write_text("base: jobs/ingest.yaml\n")
    monkeypatch.chdir(tmp_path)
    names = {"jobs/stage3.yaml": "jobs/stage2.yaml", "stage2.yml": "jobs/stage2.yaml", "picture.yml": "pictures.yaml"}
    for wrong, right in names.items():
        assert main(["run", wrong]) == 1
        assert capsys.readouterr().err == f"error: {wrong}: no such file; did you mean {right!r}?\n"


@pytest.mark.parametrize("kind", kind_names())
def test_a_new_spec_is_executable_and_valid(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own" / "mine.yaml"
    assert main(["new", kind, str(file)]) == 0
    assert f"mine.yaml: valid {kind} job" in capsys.readouterr().out
    assert main(["validate", str(file)]) == 0
    assert file.read_text().startswith(
        "#!/usr/bin/env -S python -m jobs.run\n# yaml-language-server: $schema=rzen.schema"
    )
    assert os.access(file, os.X_OK)
    assert json.loads((file.parent / "rzen.schema.json").read_text())["title"] == "rzen"


def test_a_new_spec_replaces_nothing_and_names_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    monkeypatch.setattr(new, "shipped_specs", list)  # as for a kind of another package
    assert main(["new", "train", str(file)]) == 0
    out = capsys.readouterr().out
    assert "fill in what is missing" in out
    assert "name is missing; add it" in out
    assert "# data:" in (before := file.read_text())
    assert main(["new", "train", str(file)]) == 1
    assert "mine.yaml: exists already; name another file" in capsys.readouterr().err
    assert file.read_text() == before
    assert main(["new", "trian", str(tmp_path / "other.yaml")]) == 1
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_file_that_is_like_no_other_gets_no_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nothing.yaml"]) == 1
    assert "nothing.yaml: no such file; name a spec of your own, or one of " in capsys.readouterr().err


def test_nothing_is_made_where_an_input_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.yaml").write_text(evaluate("nowhere"))
    assert main(["evaluate", "evaluate.yaml", "--set", "cache=cache", "--set", "out=out"]) == 1
    assert "there is no such manifest" in capsys.readouterr().err
    assert main(["export", "nowhere", "out"]) == 1
    assert "nowhere: is neither a directory nor a hub name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.yaml"]


@pytest.mark.parametrize("address", ["head:99999", "http://head:99999", "head:port"])
def test_a_port_that_cannot_exist_is_refused_at_once(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "job", "--address", address]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"error: --address {address}: has no port of 0 to 65535")
    assert err.count("\n") == 1
    assert out == ""


def test_stopping_jobs_without_a_head_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["stop_jobs", "1", "--address", address])
    with pytest.raises(SystemExit, match=f"error: --address {address}: no Ray cluster answers"):
        stop_jobs.main()


@pytest.mark.parametrize(("words", "expected"), [("rzen val", "validate"), ("rzen registry ro", "rollback")])
def test_shells_complete_commands(words: str, expected: str) -> None:
    variables = {"_RZEN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-m", "rzen"]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [expected]


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rzen {version('rzen')}\n"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (UserError("a", "b"), 1), (OSError(28, "full"), 1)]
)
def test_exit_status_follows_from_the_error(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("jobs.commands.spec.run_file", fail)
    assert main(["run", "x.yaml"]) == status
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "does"),
    [("ingest.yaml", "resumes from the last finished job or checkpoint"), ("corpus.yaml", "starts again")],
)
def test_an_interrupted_job_says_what_the_same_command_does(
    spec: str, does: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.runtime.dispatch.run_spec", interrupted)
    assert main(["run", str(ROOT / "jobs" / spec)]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"interrupted: the same command {does}"


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.commands.spec.run_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", "x.yaml"])


def test_kinds_are_listed_for_people_and_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kinds"]) == 0
    text = capsys.readouterr().out
    assert main(["kinds", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [kind["kind"] for kind in listed] == list(kind_names())
    assert all(kind["kind"] in text and kind["summary"] in text for kind in listed)
    (ingest,) = [kind for kind in listed if kind["kind"] == "ingest"]
    assert ingest["reads"] == {"input": "folder of files", "sources": "tables"}


def test_verify_prints_json_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(open_store(str(tmp_path)), {"red": ("text_image", 4)})
    assert main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["problems"] == []
    (tmp_path / "train" / "extra").write_text("")
    assert main(["verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["train"]["problems"] == ["train/extra: not in the manifest"]


def test_registry_prints_for_people_and_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rzen.json").write_text("{}")
    registry = Registry(open_store(str(tmp_path / "registry")))
    registry.publish("m1", tmp_path / "model", {"parents": ["base"]})
    command = ["registry", "--registry", str(tmp_path / "registry")]
    assert main([*command, "promote", "m1", "--reason", "the first", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"generation": 1, "model": "m1"}
    assert main([*command, "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parents"] == ["base"]
    assert main([*command, "show", "m1"]) == 0
    assert "parents:\n- base\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["evaluate"], ["evaluate", "--list"]])
def test_commands_of_one_kind_refuse_specs_of_others(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "jobs/ingest.yaml"
    assert main([*arguments, str(path)]) == 1
    message = f"error: {path}: kind='ingest' is not a spec of kind {arguments[0]}; use `rzen run {path}`\n"
    assert capsys.readouterr().err == message


def test_embed_takes_a_folder_a_table_or_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(models, "run_file", lambda path, changes, settings, **options: given.append(settings))
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 2)})
    (tmp_path / "photos").mkdir()
    for targets in (["photos"], ["a b.csv", "--media", "photo", "--title", "name"], ["data", "--index", "lance"]):
        assert main(["embed", "m", str(tmp_path / targets[0]), "out", *targets[1:]]) == 0
    folder, table, dataset = given
    assert folder["input"] == str(tmp_path / "photos")
    assert folder["data.root"] == table["data.root"] == "out/data"
    assert folder["splits"] == ["train", "held_out", "uncaptioned"]
    source = {"table": str(tmp_path / "a b.csv"), "positive": {"media": "photo"}, "query": {"text": "name"}}
    assert table["sources"] == {"a-b": source}
    assert (dataset["data.root"], dataset["index"]) == (str(tmp_path / "data"), "lance")
    assert not {"input", "sources", "splits"} & dataset.keys()
    assert main(["embed", "m", str(tmp_path / "data"), "out", "--media", "photo"]) == 1
    assert "is a dataset; leave out --media, --text and --title" in capsys.readouterr().err


def test_validate_prints_settings_alone_on_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "jobs/ingest.yaml", "--show"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "ingest"
    assert err == "jobs/ingest.yaml: valid ingest job\n"


def test_validate_lists_specs_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "jobs/ingest.yaml", "jobs/none.yaml", "--json", "--set", "materialized=true"]) == 1
    out, err = capsys.readouterr()
    good, bad = json.loads(out)
    assert good == {"spec": "jobs/ingest.yaml", "kind": "ingest", "error": None, "warnings": []}
    assert bad["error"].startswith("jobs/none.yaml: no such file; ")
    assert err == ""
    assert main(["validate", "jobs/ingest.yaml", "--json", "--show", "--set", "materialized=true"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["settings"]["materialized"] is True


def write_corpus_spec(folder: Path) -> str:
    kinds = ("num_composed", "num_documents", "num_clips", "num_texts")
    spec = {"kind": "corpus", "out": str(folder / "corpus"), "corpus": dict.fromkeys(kinds, 0) | {"num_images": 2}}
    (folder / "corpus.yaml").write_text(json.dumps(spec))
    return str(folder / "corpus.yaml")


def test_a_quiet_job_prints_its_outputs_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--quiet", "run", write_corpus_spec(tmp_path)]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/corpus\n", "")
    assert main(["--quiet", "validate", write_corpus_spec(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["run", write_corpus_spec(tmp_path)]) == 0  # the next command is not quiet
    assert "2 samples in" in capsys.readouterr().out


def test_a_quiet_job_still_prints_its_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = to_log(monkeypatch)
    with progress.quiet(), RunTable(["a", "b"]) as table:
        progress.say("starts")
        table.update("b", Progress(1, 1), every=1)
        table.set_state("b", "finished")
        table.set_state("a", "failed", "lost")
    assert sink.getvalue() == "  a: failed: lost\n"


def test_a_job_prints_its_result_as_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", write_corpus_spec(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["outputs"] == [f"{tmp_path}/corpus"]
    assert "2 samples in" in err


def test_log_level_is_set_for_the_code_of_rzen(monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [logging.getLogger(name) for name in ("jobs", "rzen", "pipelines")]
    before = [logger.level for logger in loggers]
    monkeypatch.setenv("RZEN_LOG", "debug")
    try:
        assert main(["kinds"]) == 0
        assert {logger.level for logger in loggers} == {logging.DEBUG}
        assert main(["--log", "error", "kinds"]) == 0
        assert {logger.level for logger in loggers} == {logging.ERROR}
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def test_invalid_spec_is_one_message_and_exit_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(ROOT / "jobs/stage2.yaml"), "--set", "steps=-1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: --set steps=-1: steps=-1: input should be greater than or equal to 1")


def test_validate_goes_on_after_a_bad_spec(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: nothing\n")
    assert main(["validate", str(tmp_path / "bad.yaml"), str(ROOT / "jobs/ingest.yaml")]) == 1
    assert "ingest.yaml: valid ingest job" in capsys.readouterr().out


def test_mistake_deep_in_a_pipeline_names_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = re.sub(r"^      steps: \d+", "      steps: none", (ROOT / "jobs/demo.yaml").read_text(), flags=re.MULTILINE)
    for path in (ROOT / "jobs").glob("*.yaml"):
        (tmp_path / path.name).write_text(text if path.name == "demo.yaml" else path.read_text())
    line = text.splitlines().index("      steps: none") + 1
    assert main(["validate", str(tmp_path / "demo.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/demo.yaml:{line}: steps='none': input should be")


def test_missing_folder_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ingest", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    hint = f"of a table, `rzen look {tmp_path}/nowhere` prints the spec that reads it"
    message = f"error: {tmp_path}/nowhere: does not exist; name a folder of images, videos or PDFs; {hint}\n"
    assert capsys.readouterr().err == message


def test_help_of_index_teaches_selectors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("json:caption", "img2dataset", "{000..499}", "jobs/index.yaml", "report.json", "--positive mp4"):
        assert word in out


def test_index_fills_in_the_shipped_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[IndexSpec] = []

    def keep(path: str, changes: list[str] | None, settings: dict[str, Any], **_: Any) -> None:
        spec, _ = read_spec(path, [*as_changes(settings), *(changes or ())])
        assert isinstance(spec, IndexSpec)
        specs.append(spec)

    monkeypatch.setattr("jobs.commands.data.run_file", keep)
    given = ["--query-media", "a.jpg", "--task", "text_video", "--positive", "mp4", "--split", "held_out"]
    assert main(["index", "x.tar", "y", "out", "--source", "clips", *given, "--set", "decode=true"]) == 0
    assert main(["index", "x.tar", "out", "--query", "json:q", "--positive-text", "json:a", "--instruction", ""]) == 0
    clips, pairs = specs[0].sources, specs[1].sources
    assert [*clips] == ["clips"]
    assert (clips["clips"].urls, clips["clips"].task, specs[0].out) == (["x.tar", "y"], "text_video", "out")
    assert (clips["clips"].query.text, clips["clips"].query.media, clips["clips"].positive.media) == (
        None,
        "a.jpg",
        "mp4",
    )
    assert clips["clips"].instruction == "Find the clip that corresponds to the given text:"
    assert (specs[0].split, specs[0].decode) == ("held_out", True)
    assert (pairs["pairs"].query.text, pairs["pairs"].positive.text, pairs["pairs"].positive.media) == (
        "json:q",
        "json:a",
        None,
    )
    assert (pairs["pairs"].instruction, specs[1].split) == ("", "train")


@pytest.mark.parametrize("selector", ["npy", "json:image", "a/b.jpg"])
def test_a_wrong_selector_names_its_rule(selector: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "x.tar", "out", "--positive", selector]) == 1
    assert "sources.pairs.positive" in capsys.readouterr().err


def test_search_before_embedding_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["search", "a red circle", "--vectors", str(tmp_path)]) == 1
    assert "vectors.json: does not exist; run a job of kind embed" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (65, "1:05"), (7389, "2:03:09")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def to_log(monkeypatch: pytest.MonkeyPatch, **options: Any) -> io.StringIO:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=sink, width=200, highlight=False, **options))
    return sink


def test_logs_get_a_line_every_n_steps_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = to_log(monkeypatch)
    with RunTable(["run"]) as table:
        table.set_state("run", "starting")
        for done in range(26):
            table.update("run", Progress(done, 25, figures={"loss": "1"}), every=10)
        table.set_state("run", "finished")
    lines = sink.getvalue().splitlines()
    assert [line.split(" (")[0].strip() for line in lines] == [
        "run: steps 10/25",
        "run: steps 20/25",
        "run: steps 25/25",
    ]
    assert all(line.endswith("loss 1") for line in lines)


def test_a_continued_run_counts_its_rate_from_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = to_log(monkeypatch)
    with RunTable(["run"]) as table:
        table.update("run", Progress(500, 1000), every=10)
        assert sink.getvalue() == ""
        table.update("run", Progress(510, 1000), every=10)
    assert sink.getvalue().startswith("  run: steps 510/1,000 (")


def test_logs_of_several_runs_tell_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = to_log(monkeypatch)
    with RunTable(["a", "b"]) as table:
        table.set_state("a", "starting")
        table.update("a", Progress(1, 3), every=10)
        table.set_state("a", "failed", "lost")
        assert table.states() == {"queued": 1, "starting": 0, "running": 0, "restart": 0, "finished": 0, "failed": 1}
    assert sink.getvalue().splitlines() == ["  a: starting", "  a: failed: lost"]


def test_a_terminal_shows_every_run_with_its_state_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = to_log(monkeypatch, force_terminal=True)
    with RunTable(["a", "b"]) as table:
        table.set_state("a", "restart 1 of 3")
        table.update("b", Progress(7, 20, figures={"loss": "2.5", "source": "red"}), every=10)
    shown = sink.getvalue()
    for word in ("a", "restart 1 of 3", "b", "running", "7/20", "loss", "2.5", "red"):
        assert word in shown


def test_pieces_of_work_get_a_few_lines_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = to_log(monkeypatch)
    with Bars() as bars:
        for done in range(101):
            bars.update("shards", done, 100, note="x")
    assert [line.split(" (")[0].strip() for line in sink.getvalue().splitlines()] == [
        f"shards: samples {done}/100" for done in (20, 40, 60, 80, 100)
    ]
