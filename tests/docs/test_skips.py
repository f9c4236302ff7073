"""Every skipped test says which command makes it run."""

import ast

from tests.paths import ROOT
from tests.skips import command_for, summary


def reasons(source: str) -> list[str]:
    """Return the reasons that a test file gives to `pytest.skip`, `skipif` and `importorskip`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        if node.func.attr == "skip":
            given += node.args
        if node.func.attr in {"skip", "skipif", "importorskip"}:
            found += [value.value for value in given if isinstance(value, ast.Constant)]
    return found


def test_every_reason_for_skipping_has_a_command() -> None:
    found = {reason for path in (ROOT / "tests").rglob("*.py") for reason in reasons(path.read_text())}
    assert len(found) > 5
    assert {reason for reason in found if command_for(reason) is None} == set()


def test_equal_reasons_are_counted_in_one_line() -> None:
    lines = summary(["Skipped: Chromium is not installed", "Chromium is not installed", "Skipped: unknown"])
    assert lines == [
        "2 skipped: Chromium is not installed. To run them: apt-get install chromium",
        "1 skipped: unknown. To run them: see the test",
    ]
