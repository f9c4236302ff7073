"""The emoji corpus from packages of the same layout, without a network: what is trained on and what is tested."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli import main
from jobs.data import emoji as job
from jobs.data import npm
from jobs.data.npm import Package, fetch_package, registry
from pipelines.benchmarks.custom import read_custom
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.samples import RawSample
from pipelines.sources.folder import read_folder

COUNT = 20
NAMED = {"en": "cat {}", "de": "Katze {}", "pt": "gato {}", "nb": "katt {}"}


def package(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def picture(number: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGBA", (32, 32), (number * 12, 255 - number * 12, 90, 200)).save(sink, "WEBP", lossless=True)
    return sink.getvalue()


def refuse(url: str, max_bytes: int) -> Any:
    raise BadMedia("missing_file")


def code(number: int) -> str:
    return f"1f{600 + number}"


def packages() -> tuple[bytes, bytes]:
    """Pictures and names. Emoji 0 has skin tones, 1 has no keywords, 2 has one name everywhere, 19 has no picture."""
    pictures = {f"assets/{code(n)}.webp": picture(n) for n in range(COUNT - 1)}
    pictures |= {f"assets/{code(0)}-1f3fb.webp": picture(0), "package.json": b"{}"}
    names = {}
    for language, form in NAMED.items():
        entries: list[dict[str, Any]] = []
        for n in range(COUNT):
            entry = {
                "hexcode": code(n).upper(),
                "label": "OK" if n == 2 else form.format(n),
                "tags": [f"tag{n}", "pet"],
            }
            entries.append(entry if n != 1 else {key: entry[key] for key in ("hexcode", "label")})
        entries[0]["skins"] = [{"hexcode": f"{code(0)}-1F3FB".upper(), "label": "cat 0: light skin tone"}]
        names[f"{language}/data.json"] = json.dumps(entries).encode()
    return package(pictures), package(names)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus that the job makes."""
    pictures, names = packages()
    monkeypatch.setattr(job, "fetch_package", lambda wanted: pictures if wanted is job.PICTURES else names)
    made(tmp_path, "emoji.languages=[en, de]")
    return tmp_path / "corpus"


def made(folder: Path, *changes: str) -> None:
    sets = [word for change in (f"out={folder}/corpus", *changes) for word in ("--set", change)]
    assert main(["run", "jobs/emoji_corpus.yaml", *sets]) == 0


def trained(corpus: Path) -> list[RawSample]:
    rows = list(read_folder(str(corpus / "pictures"), MediaConfig()))
    assert all(isinstance(row, RawSample) for row in rows)
    return [row for row in rows if isinstance(row, RawSample)]


def test_nothing_that_is_tested_was_trained_on(corpus: Path) -> None:
    rows = trained(corpus)
    train = {(row.sample.origin, row.sample.query.text) for row in rows if row.split == "train"}
    seen = {origin for origin, _ in train}
    new = {row.sample.origin: row.sample.query.text for row in rows if row.split == "held_out"}
    assert len(seen) + len(new) == COUNT - 1
    assert len(new) == 2
    assert not seen & new.keys()
    assert all(text.startswith(("cat ", "OK")) for text in new.values())
    for test, languages in (("new_languages", ("gato", "katt")), ("new_keywords", ("tag",))):
        dataset = read_custom(corpus / test)
        candidates = {item.id: item for item in dataset.candidates}
        assert len(candidates) == len(seen)
        assert all(query.item.input.text.startswith(languages) for query in dataset.queries)
        asked = {
            (candidates[id].input.media[0].member, query.item.input.text)
            for query in dataset.queries
            for id in query.relevance
        }
        assert len(asked) == len(dataset.queries)
        assert {text for _, text in asked}.isdisjoint(text for _, text in train)


def test_each_test_has_its_share_and_skin_tones_are_left_out(corpus: Path) -> None:
    rows = trained(corpus)
    counts = {source: sum(row.sample.source == source for row in rows) for source in ("names", "keywords")}
    keywords = read_custom(corpus / "new_keywords")
    assert counts == {"names": 17 * 2 + 2, "keywords": 16 - len(keywords.queries)}
    assert len(keywords.queries) == 3
    # Of 17 pictures in two languages, one may be named as in training.
    assert len(read_custom(corpus / "new_languages").queries) in (32, 34)
    assert not list(corpus.rglob("*1f3fb*"))


def test_equal_settings_give_equal_files(corpus: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in corpus.rglob("*.*l")}
    made(tmp_path, "emoji.languages=[en, de]")
    assert {path: path.read_bytes() for path in corpus.rglob("*.*l")} == before
    made(tmp_path, "emoji.languages=[en, de]", "emoji.seed=1")
    assert {path: path.read_bytes() for path in corpus.rglob("*.*l")} != before


def test_a_language_that_the_package_lacks_is_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={corpus}"
    assert main(["run", "jobs/emoji_corpus.yaml", "--set", out, "--set", "emoji.languages=[en, xx]"]) == 1
    assert "emoji.languages: 'xx' is not in emojibase-data; name folders" in capsys.readouterr().err


def test_a_tarball_of_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = package({"a": b"x"})
    wanted = Package("@some/one", "1.0.0", base64.b64encode(hashlib.sha512(data).digest()).decode())
    for way in ("_by_npm", "_by_python"):
        monkeypatch.setattr(npm, way, lambda _: data)
    assert fetch_package(wanted) == data
    with pytest.raises(UserError, match=r"@some/one@1.0.0: is not the tarball with the pinned hash"):
        fetch_package(Package("@some/one", "1.0.0", "x"))


def test_python_asks_the_registry_of_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "npmrc"
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(settings))
    assert registry() == "https://registry.npmjs.org"
    settings.write_text("//other/:_authToken=x\nregistry = https://packages.example/npm/\n")
    assert registry() == "https://packages.example/npm"
    monkeypatch.setattr(npm, "read_url", refuse)
    with pytest.raises(
        UserError, match=re.escape("https://packages.example/npm/@some/one/-/one-1.0.0.tgz: missing_file")
    ):
        npm._by_python(Package("@some/one", "1.0.0", "x"))
    monkeypatch.setenv("npm_config_registry", "https://first.example")
    assert registry() == "https://first.example"
