"""Fluent emoji with their names in many languages: a corpus of real pictures, and what a model is tested on.

    pictures/1f63d.webp, captions.jsonl   a folder for ingest: names and keywords to train on, and the name of each
                                          new picture in the split `held_out`
    new_languages/, new_keywords/         retrieval datasets (`pipelines/benchmarks/custom.py`) of pictures of training

Every test asks for something that no training sample has: a picture, a language, or the keywords of a picture. A query
that equals a text of training for the same picture is left out.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipelines.config import Config, Fraction, NonNegativeInt
from pipelines.sources.folder import LIST_NAME

PICTURES = "pictures"
_PICTURE = re.compile(r"package/assets/(?P<code>[0-9a-f-]+)\.webp")
_NAMES = re.compile(r"package/(?P<language>[a-z-]+)/data\.json")


class EmojiConfig(Config):
    """What a model is trained on, and what it is tested on."""

    languages: Annotated[list[str], Field(min_length=1)] = Field(default=["en", "es", "da"])
    """Languages whose names are trained on. The first one gives the keywords and the names of new pictures."""
    new_languages: list[str] = Field(default=["pt", "nb"])
    """Languages that are only tested, by the names of pictures of training."""
    new_pictures: Fraction = 0.1
    """Share of the pictures that are only tested, by their names in the first language."""
    new_keywords: Fraction = 0.2
    """Share of the other pictures whose keywords are only tested. Their names are trained on."""
    seed: NonNegativeInt = 0
    """Seed of the shares."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """A picture (WebP), its name in each language, and its keywords in the first language, "" without any."""

    code: str
    picture: bytes
    names: dict[str, str]
    keywords: str


def read_emoji(pictures: bytes, names: bytes, languages: Sequence[str]) -> list[Emoji]:
    """Return the emoji of two npm packages (tar.gz) that have both a picture and names, in the order of Unicode.

    Skin tones are left out, because they differ from the emoji without one in little but the color. Raises `KeyError`
    for a language that the package lacks.
    """
    picture_of = {found["code"]: data for found, data in _members(pictures, _PICTURE)}
    entries: dict[str, dict[str, Any]] = {}
    for found, data in _members(names, _NAMES):
        if found["language"] in languages:
            entries[found["language"]] = {entry["hexcode"].lower(): entry for entry in json.loads(data)}
    return [
        Emoji(
            code,
            picture_of[code],
            {language: entries[language][code]["label"] for language in languages if code in entries[language]},
            ", ".join(entry.get("tags", [])),
        )
        for code, entry in entries[languages[0]].items()
        if code in picture_of
    ]


def write_emoji(folder: Path, emoji: Sequence[Emoji], config: EmojiConfig) -> dict[str, int]:
    """Write the corpus into an empty folder. Return the number of samples for each kind of training and test."""
    fresh = _drawn([one.code for one in emoji], config.new_pictures, f"{config.seed} picture")
    seen = [one for one in emoji if one.code not in fresh]
    asked = _drawn([one.code for one in seen if one.keywords], config.new_keywords, f"{config.seed} keywords")
    names = [(one, one.names[language]) for one in seen for language in config.languages if language in one.names]
    keywords = [(one, one.keywords) for one in seen if one.keywords and one.code not in asked]
    new_names = [(one, one.names[config.languages[0]]) for one in emoji if one.code in fresh]
    lines = [_line(one, text, "names", "train") for one, text in names]
    lines += [_line(one, text, "keywords", "train") for one, text in keywords]
    lines += [_line(one, text, "names", "held_out") for one, text in new_names]
    _write(folder / PICTURES, emoji, {LIST_NAME: lines})
    trained = {(one.code, text.casefold()) for one, text in (*names, *keywords)}
    tests = {
        "new_languages": [(one, one.names[name]) for name in config.new_languages for one in seen if name in one.names],
        "new_keywords": [(one, one.keywords) for one in seen if one.code in asked],
    }
    counts = {"names": len(names), "keywords": len(keywords), "new_pictures": len(new_names)}
    for test, pairs in tests.items():
        left = [(one, text) for one, text in pairs if (one.code, text.casefold()) not in trained]
        counts[test] = len(left)
        _write_test(folder / test, seen, left)
    return counts


def _members(package: bytes, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as tar:
        for member in tar:
            found = pattern.fullmatch(member.name)
            file = tar.extractfile(member) if found and member.isfile() else None
            if found and file:
                yield found, file.read()


def _drawn(codes: Iterable[str], share: float, purpose: str) -> set[str]:
    """Return a share of the codes that depends on the arguments only."""
    ranked = sorted(codes, key=lambda code: sha256(f"{purpose} {code}".encode()).digest())
    return set(ranked[: round(share * len(ranked))])


def _line(one: Emoji, caption: str, source: str, split: str) -> dict[str, Any]:
    return {"file": f"{one.code}.webp", "caption": caption, "source": source, "split": split}


def _write_test(folder: Path, candidates: Sequence[Emoji], pairs: Sequence[tuple[Emoji, str]]) -> None:
    corpus = [{"_id": one.code, "image": f"{one.code}.webp"} for one in candidates]
    queries = [{"_id": str(number), "text": text} for number, (_, text) in enumerate(pairs)]
    _write(folder, candidates, {"corpus.jsonl": corpus, "queries.jsonl": queries})
    (folder / "qrels").mkdir()
    grades = (f"{number}\t{one.code}\t1\n" for number, (one, _) in enumerate(pairs))
    (folder / "qrels/test.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *grades]))
    settings = {"metric": "hit@1", "modality": "image", "exclude": "nothing"}
    (folder / "dataset.json").write_text(json.dumps(settings) + "\n")


def _write(folder: Path, emoji: Sequence[Emoji], lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for one in emoji:
        (folder / f"{one.code}.webp").write_bytes(one.picture)
    for name, rows in lists.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
