"""Fluent emoji with their names in many languages: a corpus of real pictures, and what a model is tested on.

    pictures/1f63d.webp, captions.jsonl   a folder for ingest: names and keywords to train on, and the name of each
                                          new picture in the split `held_out`
    pictures/tones/1f44b/1f44b-1f3fb.webp with `tones`: a folder for each emoji, which says what belongs together
    new_languages/, new_keywords/         retrieval datasets (`pipelines/benchmarks/custom.py`) of pictures of training
    new_tones/                            with `tones`: names of held-out skin tones, among all pictures in skin tones

Every test asks for something that no training sample has: a picture, a language, the keywords of a picture, or an emoji
in a skin tone. A query that equals a text of training for the same picture is left out.

Pictures of one emoji in several skin tones are look-alikes. They are hard negatives of a caption that names the tone,
and right answers to one that does not. So the truth about each negative is known.
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
_NUM_TONES = 5
_NAMES = re.compile(r"package/(?P<language>[a-z-]+)/data\.json")


class TonesConfig(Config):
    """Pictures of emoji in five skin tones. Some tones of each emoji are never trained on."""

    held_out: Annotated[int, Field(ge=0, le=4)] = 2
    """Tones of each emoji that are only tested, in the split `held_out` and in `new_tones`. With 1, no two pictures of
    an emoji are in the split."""
    unnamed_fraction: Fraction = 0.2
    """Share of the pictures of training whose captions do not name the tone. For these captions, the other tones of the
    emoji are right answers that no hash shows: false negatives."""


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
    tones: TonesConfig | None = None
    """Emoji in five skin tones, as another source of this name. `null` leaves them out: they differ from each other in
    little but the color."""
    seed: NonNegativeInt = 0
    """Seed of the shares."""


@dataclass(frozen=True, slots=True)
class Emoji:
    """A picture (WebP), its name in each language, and its keywords in the first language, "" without any."""

    code: str
    picture: bytes
    names: dict[str, str]
    keywords: str = ""
    folder: str = ""

    @property
    def file(self) -> str:
        """Return the path of the picture in a corpus."""
        return f"{self.folder}{self.code}.webp"


@dataclass(frozen=True, slots=True)
class TonedEmoji:
    """An emoji in five skin tones, the lightest first. `names` are those without a tone, in each language."""

    code: str
    names: dict[str, str]
    tones: tuple[Emoji, ...]


def read_emoji(pictures: bytes, names: bytes, languages: Sequence[str]) -> tuple[list[Emoji], list[TonedEmoji]]:
    """Return the emoji of two npm packages (tar.gz) that have both a picture and names, in the order of Unicode.

    The second list has those with a picture in each of five skin tones. Emoji of two people, whose tones differ, are
    not among them. Raises `KeyError` for a language that the package lacks.
    """
    picture_of = {found["code"]: data for found, data in _members(pictures, _PICTURE)}
    entries: dict[str, dict[str, Any]] = {}
    for found, data in _members(names, _NAMES):
        if found["language"] in languages:
            entries[found["language"]] = {entry["hexcode"].lower(): entry for entry in json.loads(data)}
    first = entries[languages[0]]
    emoji = [
        Emoji(
            code,
            picture_of[code],
            {language: entries[language][code]["label"] for language in languages if code in entries[language]},
            ", ".join(entry.get("tags", [])),
        )
        for code, entry in first.items()
        if code in picture_of
    ]
    toned = (_toned(code, {name: entries[name].get(code, {}) for name in languages}, picture_of) for code in first)
    return emoji, [one for one in toned if one]


def _toned(code: str, entry_of: Mapping[str, Mapping[str, Any]], picture_of: Mapping[str, bytes]) -> TonedEmoji | None:
    """Return an emoji in its skin tones, or None where one of five pictures is missing. `entry_of` is by language."""
    named: dict[str, dict[str, str]] = {}
    for language, entry in entry_of.items():
        for skin in entry.get("skins", []):
            if isinstance(skin.get("tone"), int):  # a list: two people
                named.setdefault(skin["hexcode"].lower(), {})[language] = skin["label"]
    if len(named) != _NUM_TONES or not named.keys() <= picture_of.keys():
        return None
    names = {language: entry["label"] for language, entry in entry_of.items() if entry}
    tones = (Emoji(tone, picture_of[tone], of, folder=f"tones/{code}/") for tone, of in sorted(named.items()))
    return TonedEmoji(code, names, tuple(tones))


def write_emoji(
    folder: Path, emoji: Sequence[Emoji], toned: Sequence[TonedEmoji], config: EmojiConfig
) -> dict[str, int]:
    """Write the corpus into an empty folder. Return the number of samples for each kind of training and test.

    The tones of new pictures are left out.
    """
    fresh = _drawn([one.code for one in emoji], config.new_pictures, f"{config.seed} picture")
    seen = [one for one in emoji if one.code not in fresh]
    asked = _drawn([one.code for one in seen if one.keywords], config.new_keywords, f"{config.seed} keywords")
    names = [(one, one.names[language]) for one in seen for language in config.languages if language in one.names]
    keywords = [(one, one.keywords) for one in seen if one.keywords and one.code not in asked]
    new_names = [(one, one.names[config.languages[0]]) for one in emoji if one.code in fresh]
    lines = [_line(one, text, "names", "train") for one, text in names]
    lines += [_line(one, text, "keywords", "train") for one, text in keywords]
    lines += [_line(one, text, "names", "held_out") for one, text in new_names]
    tones = _Tones.of([one for one in toned if one.code not in fresh], config) if config.tones else _Tones()
    lines += [_line(one, text, "tones", "train") for one, text in tones.train]
    lines += [_line(one, text, "tones", "held_out") for one, text in tones.held_out]
    _write(folder / PICTURES, [*emoji, *tones.pictures], {LIST_NAME: lines})
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
    if config.tones:
        counts |= {"tones": len(tones.train), "new_tones": len(tones.held_out)}
        _write_test(folder / "new_tones", tones.pictures, tones.held_out)
    return counts


@dataclass(frozen=True, slots=True)
class _Tones:
    """Pictures in skin tones, and those of them with a caption that are trained on or held out."""

    pictures: Sequence[Emoji] = ()
    train: Sequence[tuple[Emoji, str]] = ()
    held_out: Sequence[tuple[Emoji, str]] = ()

    @classmethod
    def of(cls, toned: Sequence[TonedEmoji], config: EmojiConfig) -> _Tones:
        """Draw the held-out tones of each emoji, and the pictures of training whose captions name no tone."""
        assert config.tones is not None
        held = {
            code
            for one in toned
            for code in _first([tone.code for tone in one.tones], config.tones.held_out, f"{config.seed} held-out tone")
        }
        pairs = [(one, tone) for one in toned for tone in one.tones]
        trained = [tone.code for _, tone in pairs if tone.code not in held]
        unnamed = _drawn(trained, config.tones.unnamed_fraction, f"{config.seed} unnamed tone")
        captioned = [
            (tone, names[language])
            for one, tone in pairs
            for names in [one.names if tone.code in unnamed else tone.names]
            for language in config.languages
            if language in names
        ]
        return cls(
            [tone for _, tone in pairs],
            [(tone, text) for tone, text in captioned if tone.code not in held],
            [(tone, text) for tone, text in captioned if tone.code in held],
        )


def _members(package: bytes, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bytes]]:
    with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as tar:
        for member in tar:
            found = pattern.fullmatch(member.name)
            file = tar.extractfile(member) if found and member.isfile() else None
            if found and file:
                yield found, file.read()


def _drawn(codes: Iterable[str], share: float, purpose: str) -> set[str]:
    """Return a share of the codes that depends on the arguments only."""
    codes = list(codes)
    return _first(codes, round(share * len(codes)), purpose)


def _first(codes: Iterable[str], count: int, purpose: str) -> set[str]:
    ranked = sorted(codes, key=lambda code: sha256(f"{purpose} {code}".encode()).digest())
    return set(ranked[:count])


def _line(one: Emoji, caption: str, source: str, split: str) -> dict[str, Any]:
    return {"file": one.file, "caption": caption, "source": source, "split": split}


def _write_test(folder: Path, candidates: Sequence[Emoji], pairs: Sequence[tuple[Emoji, str]]) -> None:
    corpus = [{"_id": one.code, "image": one.file} for one in candidates]
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
        (folder / one.folder).mkdir(parents=True, exist_ok=True)
        (folder / one.file).write_bytes(one.picture)
    for name, rows in lists.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
