"""What `rzen submit` sends: what git would keep, within Ray's limit, and nothing from outside of the folder."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from jobs.runtime.package import LIMIT_BYTES, pack
from pipelines.errors import UserError

FILES = ("a.yaml", "b.bin", "sub/c.txt", "sub/keep.log", "sub/d.log", "runs/old.yaml", "x/runs/e.txt", ".git/config")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in FILES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "empty").mkdir()
    return tmp_path


def sent(folder: Path, *excludes: str) -> set[str]:
    return set(pack(folder, excludes).sizes)


def test_patterns_of_all_sources_leave_files_out(folder: Path) -> None:
    everything = {"a.yaml", "b.bin", "sub/c.txt", "sub/keep.log", "sub/d.log", "x/runs/e.txt", "empty/"}
    assert sent(folder) == everything
    assert sent(folder, "*.bin", "/sub/") == {"a.yaml", "x/runs/e.txt", "empty/"}
    (folder / ".gitignore").write_text("*.log\n!keep.log\nempty/\n")
    (folder / "sub/.rayignore").write_text("/c.txt\n")
    ignored = {"sub/d.log", "sub/c.txt", "empty/"}
    assert sent(folder) == everything - ignored | {".gitignore", "sub/.rayignore"}


def test_the_variable_of_ray_for_gitignore_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".gitignore").write_text("*.bin\n")
    assert "b.bin" not in sent(folder)
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert "b.bin" in sent(folder)


def test_ignored_files_are_those_of_git(folder: Path) -> None:
    (folder / ".git/config").unlink()
    (folder / ".git").rmdir()
    (folder / ".gitignore").write_text("# a comment\n*.log\n!keep.log\n/x/\n/sub/*\n!/sub/c.txt\nempty\n/runs\n")
    (folder / "sub/.gitignore").write_text("c.*\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    kept = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert sent(folder) == {path for path in kept.split("\0") if path}


def test_files_of_the_spec_travel_whatever_ignores_them(folder: Path) -> None:
    assert "runs/old.yaml" not in sent(folder)
    assert "runs/old.yaml" in pack(folder, ["*.yaml"], [folder / "runs/old.yaml"]).sizes


def test_equal_files_give_equal_packages_of_the_size_that_was_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "a.yaml").chmod(0o755)
    package = pack(folder, ())
    one, two = tmp_path.parent / f"{tmp_path.name}-1.zip", tmp_path.parent / f"{tmp_path.name}-2.zip"
    package.write(one)
    os.utime(folder / "b.bin", (1, 1))
    pack(folder, ()).write(two)
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size == package.num_bytes + 22  # the end of the directory
    with zipfile.ZipFile(one) as packed:
        assert set(packed.namelist()) == set(package.sizes)
        assert packed.read("sub/c.txt") == b"sub/c.txt"
        assert packed.getinfo("a.yaml").external_attr >> 16 & 0o111  # specs are executable


def test_a_large_file_is_named_before_anything_is_sent(folder: Path) -> None:
    """ray#45602: Ray zips it, sends it, and gets an error without a name."""
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(120_000_000)
    with pytest.raises(UserError) as caught:
        pack(folder, ())
    told = str(caught.value)
    assert f"has 120 MB to send, and Ray takes {LIMIT_BYTES / 1e6:.0f} MB" in told
    assert "the largest files are weights.bin (120.0 MB), sub/keep.log (0.0 MB), " in told
    assert told.count(" MB)") == 5
    assert "submit.excludes" in told
    assert "weights.bin" not in sent(folder, "weights.*")


def test_far_too_much_is_not_counted_to_its_end(tmp_path: Path) -> None:
    for number in range(30):
        with (tmp_path / f"{number:02}.bin").open("wb") as file:
            file.truncate(LIMIT_BYTES)
    with pytest.raises(UserError, match=f"has more than {10 * LIMIT_BYTES / 1e6:.0f} MB"):
        pack(tmp_path, ())


@pytest.mark.parametrize(
    ("link", "target", "problem"),
    [
        ("sub/up", "..", "is a link to .., a folder around it"),
        ("sub/here", ".", "is a link to ., a folder around it"),
        ("out", "/usr", "is a link to /usr, which is not in the folder that is sent"),
        ("sub/out.txt", "../../other.txt", "other.txt, which is not in the folder that is sent"),
    ],
)
def test_links_that_leave_the_folder_or_loop_are_named(folder: Path, link: str, target: str, problem: str) -> None:
    """ray#38566: Ray walks a link to `..` for minutes, and copies what is outside."""
    (folder.parent / "other.txt").touch()
    (folder / link).symlink_to(target)
    with pytest.raises(UserError) as caught:
        pack(folder, ())
    assert str(caught.value).startswith(f"{folder / link}: ")
    assert problem in str(caught.value)
    assert "submit.excludes" in str(caught.value)
    assert sent(folder, f"/{link}") == sent(folder, f"/{link}", "/nothing")


def test_two_folders_that_link_to_each_other_are_named(folder: Path) -> None:
    (folder / "x/sub").symlink_to("../sub")
    (folder / "sub/x").symlink_to("../x")
    with pytest.raises(UserError, match="a folder around it"):
        pack(folder, ())


def test_links_within_the_folder_are_sent_as_what_they_show(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("sub")
    (folder / "a-link.yaml").symlink_to("a.yaml")
    (folder / "nothing").symlink_to("gone")
    os.mkfifo(folder / "pipe")
    assert {"link/c.txt", "a-link.yaml"} < sent(folder)
    assert not {"nothing", "pipe"} & sent(folder)


def test_names_that_are_not_utf8_are_refused(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).touch()
    with pytest.raises(UserError, match=r"caf�.txt: has a name that is not UTF-8"):
        pack(folder, ())
