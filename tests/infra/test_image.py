"""The Dockerfile as it is written: no engine is needed, and none of this says that it builds."""

import re
import tomllib

import pytest

from infra.image import hashes
from tests.paths import ROOT

FILE = ROOT / "infra" / "image" / "Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of every instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def problems(text: str) -> list[str]:
    """What we do not want in an image."""
    found, stages, users = [], {}, {}
    stage = ""
    for word, rest in instructions(text):
        if word == "FROM":
            image, _, stage = rest.partition(" AS ")
            stages[stage] = image
            users[stage] = users.get(image, "root")
            if image not in stages and not re.fullmatch(r"[\w/.-]+:\d[\w.-]*(@sha256:[0-9a-f]{64})?", image):
                found.append(f"{image} is not pinned")
        elif word == "USER":
            users[stage] = rest
        elif word == "RUN" and "pip install" in rest and "-c /source/requirements.lock" not in rest:
            found.append(f"{stage}: installs what no lock pins")
        elif word == "COPY":
            found.append(f"{stage}: keeps sources beside the package")
    for target in ("cpu", "gpu"):
        if target not in stages:
            found.append(f"no target {target}")
        elif users[target] == "root":
            found.append(f"{target}: runs as root")
    environment = " ".join(rest for word, rest in instructions(text) if word == "ENV")
    if "PATH=/opt/venv/bin:$PATH" not in environment:
        found.append("the environment is not first in PATH")
    if "RAY_AUTH_MODE=token" not in environment:
        found.append("Ray answers without a token")
    return found


def test_images_are_locked_and_not_root() -> None:
    assert problems(FILE.read_text()) == []


def test_images_hold_what_the_server_needs() -> None:
    installs = [rest for word, rest in instructions(FILE.read_text()) if word == "RUN" and "pip install" in rest]
    extras = [set(found[1].split(",")) for rest in installs if (found := re.search(r"/source\[([^]]+)\]", rest))]
    assert len(extras) == 2
    assert all({"serve", "index"} <= some for some in extras)


def test_a_base_image_may_have_the_digest_of_the_day() -> None:
    image = "python:3.11-slim-bookworm"
    text = FILE.read_text()
    assert image in text
    assert problems(text.replace(image, f"{image}@sha256:{'0' * 64}")) == []
    assert problems(text.replace(image, f"{image}@sha256:0")) == [f"{image}@sha256:0 is not pinned"]


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("USER rzen\n", "", "cpu: runs as root"),
        ("python:3.11-slim-bookworm", "python:latest", "python:latest is not pinned"),
        ("-c /source/requirements.lock --extra", "--extra", "cpu: installs what no lock pins"),
        ("/opt/venv/bin:$PATH", "$PATH:/opt/venv/bin", "the environment is not first in PATH"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "Ray answers without a token"),
        ("FROM base AS gpu", "FROM base AS cuda", "no target gpu"),
    ],
)
def test_planted_faults_are_found(right: str, wrong: str, told: str) -> None:
    text = FILE.read_text()
    assert right in text
    assert told in problems(text.replace(right, wrong))


def lock_problems(lock: str) -> list[str]:
    """Pins that only the machine which made the lock can resolve."""
    pins = [line for line in lock.splitlines() if line and not line.startswith("#")]
    return [pin for pin in pins if not re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", pin)]


def test_the_lock_holds_on_every_machine() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert lock_problems(lock) == []
    assert lock_problems(lock.replace("torch==2.13.0", "torch==2.13.0+cpu")) == ["torch==2.13.0+cpu"]
    assert lock_problems(f"{lock}rzen @ file:///tmp/rzen\n") == ["rzen @ file:///tmp/rzen"]
    python = re.search(r"FROM python:(\d+\.\d+)", FILE.read_text())
    assert python is not None
    assert f"Python {python[1]} on Linux" in lock  # the lock was tried there


def test_all_that_is_installed_is_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"/source\[([\w,]+)\]", FILE.read_text()))
    assert extras == {"tracking,pymupdf,decord,heif,mining,judge,curation,serve,index,qdrant"}
    optional = project["optional-dependencies"]
    extra = [requirement for name in ("tracking", "pymupdf", "decord", "heif") for requirement in optional[name]]
    lock = {line.partition("==")[0].replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()}
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in [*project["dependencies"], *extra]}  # type: ignore[index]
    assert names <= lock


def test_the_build_gets_what_the_package_is_made_of_and_no_more() -> None:
    ignore = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if line and not line.startswith("#")]
    assert patterns[0] == "*"
    sent = {line[1:] for line in patterns if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    packages = re.findall(r'include = \["(\w+)\*", "(\w+)\*", "(\w+)\*"\]', (ROOT / "pyproject.toml").read_text())
    assert set(packages[0]) | {"pyproject.toml", "requirements.lock", "README.md", "LICENSE"} == sent


def test_every_pinned_package_but_torch_has_a_hash() -> None:
    lock = hashes.pinned((ROOT / "requirements.lock").read_text())
    lines = [line for line in hashes.HASHES.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert [line.partition(" ")[0] for line in lines] == lock, "run python -m infra.image.hashes"


def test_a_hash_is_that_of_the_file_that_pip_names() -> None:
    def package(name: str, digest: str) -> dict[str, object]:
        info = {"archive_info": {"hashes": {"sha256": digest}}}
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    lock = hashes.pinned("# a comment\ntorch==2.0\nzope.interface==1.0\nmy-package==1.0\n")
    found = hashes.hashed(lock, [package("My_Package", "a" * 64), package("zope.interface", "b" * 64)])
    assert found.splitlines()[2:] == [
        f"zope.interface==1.0 --hash=sha256:{'b' * 64}",
        f"my-package==1.0 --hash=sha256:{'a' * 64}",
    ]
    with pytest.raises(KeyError):
        hashes.hashed(["other==1.0"], [])
