"""Every file of infra/ says in its first lines who reads it."""

from pathlib import Path

import pytest

from tests.paths import ROOT

FOLDER = ROOT / "infra"
WITHOUT_COMMENTS = {"iam", "grafana"}  # JSON; the README's table names them
FILES = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_begins_with_what_it_is(path: Path) -> None:
    if path.suffix == ".json":
        assert path.parent.name in WITHOUT_COMMENTS
        return
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# ", '"""')), first
    assert "FILL" not in first
