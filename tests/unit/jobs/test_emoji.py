"""The emoji corpus from packages of the same layout, without a network: what is trained on and what is tested."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli import main
from jobs.data import emoji as job
from jobs.data import npm
from jobs.data.npm import Package, fetch_package, registry
from jobs.spec.load import read_document
from pipelines.benchmarks.custom import read_custom
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.samples import RawSample
from pipelines.sources.folder import read_folder
from tests.paths import ROOT

COUNT = 20
TONED = (*range(3, 11),)
"""Emoji with a name and a picture in each of five skin tones."""
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")
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


def tone_code(number: int, tone: int) -> str:
    return f"{code(number)}-1f3f{'bcdef'[tone]}-200d-2640"


def skins(number: int, name: str) -> list[dict[str, Any]]:
    return [
        {"hexcode": tone_code(number, n).upper(), "label": f"{name}: {tone} skin tone", "tone": n + 1}
        for n, tone in enumerate(TONE_NAMES)
    ]


def packages() -> tuple[bytes, bytes]:
    """Pictures and names.

    Emoji 0 has one skin tone, 1 has no keywords, 2 has one name everywhere, 19 has no picture. Those of `TONED` have
    five tones. 11 lacks the picture of one. 12 shows two people, so that it has pairs of tones as well.
    """
    pictures = {f"assets/{code(n)}.webp": picture(n) for n in range(COUNT - 1)}
    pictures |= {f"assets/{tone_code(n, tone)}.webp": picture(n + tone) for n in (*TONED, 11, 12) for tone in range(5)}
    del pictures[f"assets/{tone_code(11, 4)}.webp"]
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
        for n in (*TONED, 11, 12):
            entries[n]["skins"] = skins(n, form.format(n))
        entries[12]["skins"][0]["tone"] = [1, 2]
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
    assert not list(corpus.rglob("*1f3f*"))
    assert not (corpus / "new_tones").exists()


TONES = ("emoji.tones={held_out: 2, unnamed_fraction: 0.5}", "emoji.languages=[en, de]", "emoji.new_pictures=0.3")


@pytest.fixture
def toned(corpus: Path, tmp_path: Path) -> Path:
    """The corpus of the same packages with skin tones."""
    made(tmp_path, *TONES)
    return corpus


def test_held_out_tones_are_never_trained_on_and_have_look_alikes_in_the_test(toned: Path) -> None:
    rows = [row for row in trained(toned) if row.sample.source == "tones"]
    new = {row.sample.origin for row in trained(toned) if (row.sample.source, row.split) == ("names", "held_out")}
    families = [n for n in TONED if f"{code(n)}.webp" not in new]
    assert 0 < len(families) < len(TONED)  # the draw of new pictures takes one, so that its tones are left out
    tones = {split: {row.sample.origin for row in rows if row.split == split} for split in ("train", "held_out")}
    assert len(tones["train"] | tones["held_out"]) == 5 * len(families)
    assert tones["train"].isdisjoint(tones["held_out"])
    for n in families:
        folder = f"tones/{code(n)}/"
        assert [sum(origin.startswith(folder) for origin in tones[split]) for split in tones] == [3, 2]
    assert all(row.sample.query.text.endswith(" skin tone") for row in rows if row.split == "held_out")
    assert [sum(row.split == split for row in rows) for split in tones] == [
        2 * 3 * len(families),
        2 * 2 * len(families),
    ]
    dataset = read_custom(toned / "new_tones")
    asked = [next(iter(query.relevance)) for query in dataset.queries]
    candidates = {item.id: item.input.media[0].member for item in dataset.candidates}
    assert (len(asked), len(candidates)) == (4 * len(families), 5 * len(families))
    drawn = [frozenset(one.split("-1f3f")[1][0] for one in tones["held_out"] if code(n) in one) for n in families]
    assert len(set(drawn)) > 1  # each emoji draws its own


def test_captions_without_a_tone_say_which_negatives_are_false(toned: Path) -> None:
    rows = [row for row in trained(toned) if (row.sample.source, row.split) == ("tones", "train")]
    unnamed = {row.sample.origin for row in rows if not row.sample.query.text.endswith(" skin tone")}
    assert len(unnamed) == round(0.5 * len(rows) / 2)  # in two languages
    for row in rows:
        number = int(row.sample.origin.split("/")[1][2:]) - 600
        names = {NAMED[language].format(number) for language in ("en", "de")}
        tone = "bcdef".index(row.sample.origin.split("-1f3f")[1][0])
        text = row.sample.query.text
        # The folder says which pictures are right answers: all of it, or the one whose tone is named.
        assert text.removesuffix(f": {TONE_NAMES[tone]} skin tone") in names
        assert (text in names) == (row.sample.origin in unnamed)


def test_clusters_of_the_shipped_ablation_are_the_trained_tones_of_an_emoji(toned: Path) -> None:
    pattern = re.compile(read_document(ROOT / "jobs/ablation.yaml").data["jobs"]["cluster"]["set"]["origin"])
    rows = [row.sample for row in trained(toned) if row.split == "train"]
    clusters = Counter((found[1], row.source) for row in rows if (found := pattern.search(row.origin)))
    assert {source for _, source in clusters} == {"tones"}
    assert set(clusters.values()) == {3 * 2}


def test_too_many_held_out_tones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    change = ["--set", "emoji.tones={held_out: 5}"]
    assert main(["run", "jobs/emoji_corpus.yaml", *change]) == 1
    assert "emoji.tones.held_out=5: input should be less than or equal to 4" in capsys.readouterr().err


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
