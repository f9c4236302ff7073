"""What leaves the program: no secrets in records, cards and logs, no control characters, no markup of others."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from jobs.cli import main
from jobs.commands.output import SafeFormatter
from jobs.runtime.progress import console, say
from jobs.runtime.records import as_json
from jobs.spec.load import check, override, read_document
from jobs.training.runs import LOG, SPEC, Run
from pipelines.redaction import code_span, escape_markdown, printable, redact_text, redacted
from rzen.config import ModelIdentity
from rzen.evaluation.results import Result, markdown_table, write_results
from rzen.export.card import model_card
from rzen.export.card_metadata import ModelCardData
from rzen.model.checkpoints import write_json
from tests.tiny import tiny_checkpoint

SPECS = """
kind: train
name: t
run: {root: runs}
data: {root: data}
model: {backbone: {hidden: 32}, tune: full}
global_batch: 4
steps: 3
"""
DATA = {"data": {"a": "f00d"}, "steps": 3}


def run_of(folder: Path, *changes: str) -> Run:
    path = folder / "t.yaml"
    path.write_text(SPECS)
    return Run(check(override(read_document(path), [f"run.root={folder / 'runs'}", *changes])))  # type: ignore[arg-type]


def test_no_secret_is_in_the_records_of_a_run(tmp_path):
    changes = (
        "submit.env={HF_TOKEN: plain-SECRET1, OMP_NUM_THREADS: SECRET2}",
        "run.tracking.mlflow='https://me:SECRET3@mlflow.example/?token=SECRET4'",
        "data.endpoint='http://AKIAIOSFODNN7EXAMPLE:SECRET5@s3.example'",
    )
    run = run_of(tmp_path, *changes)
    assert run.begin(DATA)
    run.log("lost https://me:SECRET6@host/x with AWS_SECRET_ACCESS_KEY=SECRET7 \x1b[2J")
    for name in (SPEC, LOG):
        text = run.store.read(name).decode()
        assert "SECRET" not in text.replace("AWS_SECRET_ACCESS_KEY", "")
        assert "AKIA" not in text
        assert "\x1b" not in text
    stored = json.loads(run.store.read(SPEC))["spec"]
    assert stored["submit"]["env"] == {"HF_TOKEN": "***", "OMP_NUM_THREADS": "***"}
    assert stored["run"]["tracking"]["mlflow"] == "https://***@mlflow.example/?token=***"
    assert stored["data"]["endpoint"] == "http://***@s3.example"
    assert stored["optim"]["lr"]
    assert run_of(tmp_path, *(change.replace("SECRET", "CHANGED") for change in changes)).begin(DATA), "the same run"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/path", "https://***@host/path"),
        ("s3://key:secret@bucket/a@b.jpg", "s3://***@bucket/a@b.jpg"),
        ("postgresql+psycopg://u:p@h:5/d", "postgresql+psycopg://***@h:5/d"),
        ("https://h/x?X-Amz-Signature=abc123&a=1&access_token=xyz", None),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG", "AWS_SECRET_ACCESS_KEY=***"),
        ("password: hunter2", "password: ***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("a hf_abcdefghijklmnop in words", "a *** in words"),
        ("ghp_" + "a" * 36, "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY----- after", "*** after"),
        *((same, same) for same in ("s3://bucket/a@b", "max_text_tokens: 512", "git@host:x", "f00d" * 16)),
    ],
)
def test_secrets_are_known_by_their_form(text, expected):
    if expected is None:
        expected = "https://h/x?X-Amz-Signature=***&a=1&access_token=***"
    assert redact_text(text) == expected
    assert redact_text(redact_text(text)) == expected


def test_values_are_hidden_by_their_key():
    given = {"wandb_api_key": "a", "password": "b", "nested": [{"auth-token": "c"}], "lora": {"rank": 8}, "token": None}
    assert redacted(given) == {
        **{"wandb_api_key": "***", "password": "***", "nested": [{"auth-token": "***"}], "lora": {"rank": 8}},
        "token": None,
    }
    assert b"hunter2" not in as_json({"url": "https://u:hunter2@h"})


def test_results_soups_and_models_are_written_without_secrets(tmp_path):
    settings = {"spec": {"data": {"endpoint": "http://k:SECRET@h"}}}
    write_results(tmp_path / "results.json", [Result("m", "t", "hit@1", 0.5, 1, 2, 0.5)], settings)
    write_json(tmp_path / "soup.json", {"parents": [{"place": "s3://k:SECRET@b/x"}]})
    for path in tmp_path.iterdir():
        assert "SECRET" not in path.read_text()


def card(tmp_path: Path, lineage: dict[str, str], facts: ModelCardData) -> str:
    folder = tmp_path / "model"
    tiny_checkpoint(folder)
    (folder / "rzen.json").write_text(json.dumps({"lineage": lineage}))
    return model_card(folder, ModelIdentity(), "rzen_release", None, 8, facts)


def test_a_model_card_holds_no_secret_and_no_markup_of_others(tmp_path):
    recipe = {
        "spec": {"global_batch": 4, "submit": {"env": {"HF_TOKEN": "SECRET1"}}, "note": "```\n# injected"},
        "data": {"data": {"<script>alert(1)</script>": "x`\n# injected"}, "steps": 3},
        "revision": "a`\n# injected",
    }
    row = asdict(Result("m", "a|b<img src=x>\n# injected", "hit@1", 0.5, 1, 2, 0.5))
    facts = ModelCardData(
        title="good\n# injected",
        recipes={"<b>run</b>": recipe},
        weights={"[link](javascript:alert(1))": 1.0},
        method="mean`\n# injected",
        scores={"rows": [row], "settings": {"data": "x`\n# injected"}},
        versions={"lib\n# injected": "<script>"},
    )
    text = card(tmp_path, {"base": "s3://AKIA:SECRET2@x/base`\n# injected\n<script>1</script>"}, facts)
    assert "SECRET" not in text
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    headings = [tokens[k + 1].content for k, token in enumerate(tokens) if token.type == "heading_open"]
    assert [heading for heading in headings if heading.startswith("injected")] == []
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert "javascript:" not in html.replace("[link](javascript:alert(1))", "")
    assert 'href="javascript' not in html


@pytest.mark.parametrize(
    "text", ["a|b", "a`b``c", "<script>x</script>", "[a](b)", "a\n# b", "\\", "a\\|b", "&lt;", "a\x1b[2Jb"]
)
def test_markdown_shows_the_text_and_nothing_else(text):
    shown = " ".join(printable(text).split())
    table = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = table.parse(f"| {escape_markdown(text)} | x |\n| --- | --- |\n| a | b |\n")
    cell = next(token for token in tokens if token.type == "inline")
    assert "".join(child.content for child in cell.children or ()) == shown
    (inline,) = (token for token in table.parse(f"* x {code_span(text)}") if token.type == "inline")
    assert [child.content for child in inline.children or () if child.type == "code_inline"] == [shown]


def test_names_of_models_do_not_break_tables():
    row = Result("a|b <i>\nx", "t", "hit@1", 0.5, 1, 2, 0.5)
    assert "| a\\|b &lt;i&gt; x | 50.0 |" in markdown_table([row])


CONTROL = "\x1b[2J\x1b]0;owned\x07\x08\x9b31m\u202egnp\u2028\r"


def test_the_terminal_gets_no_control_characters_of_others(capsys, tmp_path):
    say(f"  name {CONTROL} end")
    with console.capture() as captured:
        console.print(f"name {CONTROL}", markup=False)
    path = tmp_path / f"{CONTROL.replace('/', '')}.yaml"
    assert main(["validate", str(path)]) == 1
    assert main(["run", str(path)]) == 1
    out, err = capsys.readouterr()
    for text in (out, err, captured.get()):
        assert not any(character in text for character in CONTROL if character not in "[]0;2Jowned31mgnp")
    assert "name \ufffd[2J" in out
    assert "error: " in err


def test_styles_of_our_own_stay():
    with console.capture() as captured:
        previous, console.no_color = console.no_color, False
        console.print("text", style="bold", markup=False)
        console.no_color = previous
    assert "text" in captured.get()


def test_log_messages_are_safe():
    record = logging.LogRecord("a", logging.WARNING, "", 0, "at %s with %s", ("https://u:p@h", CONTROL), None)
    text = SafeFormatter("%(message)s").format(record)
    assert text.startswith("at https://***@h with \ufffd[2J")
    assert "\x1b" not in text


def test_a_settings_dump_has_no_secrets(tmp_path, capsys):
    path = tmp_path / "t.yaml"
    path.write_text(SPECS)
    assert main(["validate", str(path), "--show", "--set", "run.tracking.mlflow=https://u:SECRET@h"]) == 0
    assert "SECRET" not in capsys.readouterr().out
    assert sys.stdout is not None
