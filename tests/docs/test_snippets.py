"""Code in the Markdown files is run, validated, or says why it is not run."""

import contextlib
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.spec.load import check, read_document
from tests.docs.prose import files
from tests.docs.snippets import Snippet, commands, examples, indented_code, paths_in_text, snippets
from tests.docs.test_prose import PENDING
from tests.paths import ROOT
from tests.tiny import tiny_checkpoint

LANGUAGES = {"python", "yaml", "console", "bash", "text", "json", "toml", "promql", "dockerfile"}
SHELL = {"console", "bash"}
ALL = [snippet for path in files(ROOT) if path.suffix == ".md" for snippet in snippets(ROOT, path)]


def of(*languages: str) -> list[Snippet]:
    return [snippet for snippet in ALL if snippet.language in languages]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the shipped specs in `jobs`."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "jobs").mkdir()
    for path in (ROOT / "jobs").glob("*.yaml"):
        (folder / "jobs" / path.name).write_text(path.read_text())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """The working folder with `model`, a tiny checkpoint."""
    tiny_checkpoint(folder / "model")
    return folder


@pytest.mark.parametrize("snippet", ALL, ids=lambda snippet: snippet.place)
def test_every_block_names_its_language(snippet: Snippet) -> None:
    assert snippet.language in LANGUAGES, f"{snippet.place}: write one of {sorted(LANGUAGES)} after the fence"
    if snippet.note.startswith("not run"):
        assert snippet.reason_not_to_run, f"{snippet.place}: write <!-- not run: REASON -->"


@pytest.mark.parametrize("path", [path for path in files(ROOT) if path.suffix == ".md"], ids=str)
def test_code_is_fenced(path: Path) -> None:
    """Indented blocks would escape the tests of code."""
    if str(path) in PENDING:
        return
    assert indented_code((ROOT / path).read_text()) == []


def test_indented_code_is_found() -> None:
    assert indented_code("Then\n\n    rzen run\n    rzen\n\n```bash\nmake\n```\n") == ["rzen run"]


def missing_paths(path: Path) -> list[str]:
    """Return the paths that a Markdown file names and that are neither in the repository nor next to the file."""
    text = (ROOT / path).read_text()
    places = ROOT, (ROOT / path).parent
    return [
        name
        for name in paths_in_text(text)
        if name.partition("/")[0] != "runs"  # outputs, which may be there
        and any((place / name.partition("/")[0]).exists() for place in places)  # else it is of another program
        and not any((place / name).exists() for place in places)
    ]


@pytest.mark.parametrize("path", [path for path in files(ROOT) if path.suffix == ".md"], ids=str)
def test_named_files_exist(path: Path) -> None:
    assert missing_paths(path) == []


def test_named_tests_exist() -> None:
    named = {
        name
        for path in files(ROOT)
        if path.suffix == ".md"
        for name in re.findall(r"`(test_\w+)`", (ROOT / path).read_text())
    }
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"^ *def (test_\w+)\(", source, re.MULTILINE)}
    assert len(named) > 5
    assert sorted(named - defined) == []


def test_a_file_that_is_gone_is_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    (tmp_path / "runs").mkdir()
    names = "`rzen/families.py`, `rzen/gone.py`, `pipelines/`, `elsewhere/gone.py`, `data/{a}.tar`, `runs/demo/gone.md`"
    readme.write_text(f"{names}\n")
    assert missing_paths(readme) == ["rzen/gone.py"]


@pytest.mark.parametrize("path", sorted({snippet.path for snippet in of("python")}), ids=str)
def test_python_runs(path: Path, model: Path) -> None:
    """Run all blocks of a file in one new interpreter, one after the other."""
    blocks = [snippet for snippet in of("python") if snippet.path == path and not snippet.reason_not_to_run]
    if not blocks:
        return
    code = "\n".join(f"# {snippet.place}\n{snippet.code}" for snippet in blocks)
    done = run([sys.executable, "-c", code], model)
    assert done.returncode == 0, f"{path}\n{done.stderr}"


@pytest.mark.parametrize("snippet", of("yaml"), ids=lambda snippet: snippet.place)
def test_yaml_is_a_valid_spec(snippet: Snippet, folder: Path) -> None:
    content = yaml.safe_load(snippet.code)
    if snippet.reason_not_to_run:
        return
    assert isinstance(content, dict), snippet.place
    if snippet.spec:
        content = {"base": snippet.spec, **content}
    assert "kind" in content or "base" in content, (
        f"{snippet.place}: write <!-- spec: jobs/NAME.yaml --> before a part of a spec"
    )
    path = folder / f"{snippet.path.as_posix().replace('/', '-')}-{snippet.line}.yaml"
    path.write_text(yaml.safe_dump(content))
    check(read_document(path))


@pytest.mark.parametrize("snippet", of(*SHELL), ids=lambda snippet: snippet.place)
def test_commands_exist_with_their_options(snippet: Snippet) -> None:
    for words in commands(snippet.code):
        program, *rest = words
        if Path(program).name == "rzen":
            known = rzen_options(rest)
            options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
            assert options <= known, f"{snippet.place}: {' '.join(words)}: unknown {sorted(options - known)}"
            for word in rest:
                if re.fullmatch(r"jobs/[a-z0-9_]+\.yaml", word):
                    assert (ROOT / word).is_file(), f"{snippet.place}: {word} does not exist"
        elif program == "make":
            targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {word for word in rest if "=" not in word and not word.startswith("-")} <= targets, snippet.place
        elif Path(program).name.startswith("python") and rest[:1] == ["-m"]:
            module = ROOT / rest[1].replace(".", "/")
            ours = rest[1].split(".")[0] in {"jobs", "rzen", "pipelines", "infra", "tests"}
            assert not ours or module.is_dir() or module.with_suffix(".py").is_file(), f"{snippet.place}: {rest[1]}"


@pytest.mark.parametrize(
    "snippet", [snippet for snippet in of("console") if examples(snippet.code)], ids=lambda snippet: snippet.place
)
def test_commands_print_what_is_shown(snippet: Snippet, model: Path) -> None:
    """Run a block with `$ ` prompts. `...` in its output stands for anything."""
    if snippet.reason_not_to_run:
        return
    for command, shown in examples(snippet.code):
        done = run(["bash", "-ec", command], model)
        assert done.returncode == 0, f"{snippet.place}: {command}\n{done.stdout}{done.stderr}"
        pattern = re.escape(shown.strip()).replace(r"\.\.\.", ".*")
        assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), f"{snippet.place}: {command}\n{done.stdout}"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=120)


def rzen_options(words: list[str]) -> set[str]:
    """Return the options that `rzen COMMAND --help` lists. A command that does not exist has none."""
    names = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)][:2]
    return _listed(tuple(names[:1])) | _listed(tuple(names)) | {"--help", "--version"}


@cache
def _listed(names: tuple[str, ...]) -> set[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main([*names, "--help"])
        except SystemExit as stop:
            status = stop.code
    assert len(names) > 1 or status in (0, None), f"rzen {' '.join(names)} is no command"
    return set(re.findall(r"--?[a-z][a-z-]*", out.getvalue()))


def test_blocks_and_their_notes_are_found(tmp_path: Path) -> None:
    text = (
        "<!-- not run: needs a cluster -->\n```bash\nray up x\n```\n\n"
        "```yaml\na: 1\n```\n<!-- spec: jobs/a.yaml -->\n\n```yaml\n```\n"
    )
    (tmp_path / "README.md").write_text(text)
    found = snippets(tmp_path, Path("README.md"))
    assert [(s.line, s.language, s.reason_not_to_run, s.spec) for s in found] == [
        (2, "bash", "needs a cluster", ""),
        (6, "yaml", "", ""),
        (11, "yaml", "", "jobs/a.yaml"),
    ]


def test_commands_are_split_from_prompts_comments_and_output() -> None:
    assert commands("A=1 rzen run a.yaml \\\n  --set b=c   # once\nmake test && make check\n") == [
        ["rzen", "run", "a.yaml", "--set", "b=c"],
        ["make", "test"],
        ["make", "check"],
    ]
    assert commands("$ rzen --version\nrzen 0.1.0\n") == [["rzen", "--version"]]
    assert examples("$ a\n1\n2\n$ b\n") == [("a", "1\n2\n"), ("b", "")]


@pytest.mark.parametrize("command", ["rzen run jobs/stage1.yaml --nothing", "rzen run jobs/gone.yaml", "make nothing"])
def test_commands_that_do_not_exist_are_found(command: str) -> None:
    with pytest.raises(AssertionError):
        test_commands_exist_with_their_options(Snippet(Path("README.md"), 1, "bash", command, ""))


def test_a_wrong_key_in_yaml_is_found(folder: Path) -> None:
    snippet = Snippet(Path("README.md"), 1, "yaml", "step: 3\n", "spec: jobs/stage2.yaml")
    with pytest.raises(Exception, match="step"):
        test_yaml_is_a_valid_spec(snippet, folder)
