"""The demo's corpus: an ordinary folder of images, PDFs and clips with captions that describe them.

    captions.jsonl                    one sample a line, paths relative to the folder, pages from zero
    images/00000.jpg                  a scene (every eighth is a PNG)
    images/edit-00000-before.jpg      the reference of a composed query and
    images/edit-00000-after.jpg       its target
    images/00000-again-00.jpg         a scene drawn again, under the caption of the first drawing (optional)
    images/shapes-00000.jpg           some equal things, whose class is the target (optional)
    documents/0000.pdf                a report, each page of which is a sample
    clips/00000.mp4                   a short video
    .complete                         fingerprint of the settings, written last (`.building` until then)

Within a kind of sample, no two share all attributes, so that held-out samples are combinations never trained on. Scenes
drawn again and classes would break this rule: their lines name the split to which they belong.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path, PurePosixPath
from random import Random
from typing import TypeVar

from pipelines.errors import UserError
from pipelines.storage.publish import LEASE, MARK
from pipelines.synthetic.classes import QUESTIONS, Group, all_groups, draw_group
from pipelines.synthetic.clips import Clip, all_clips, draw_clip, encode_clip
from pipelines.synthetic.config import CorpusConfig
from pipelines.synthetic.documents import Page, all_pages, draw_document
from pipelines.synthetic.scenes import Scene, all_scenes, draw_scene, edit_into, encode_image, neighbors

COMPLETE, BUILDING, CAPTIONS = ".complete", ".building", "captions.jsonl"

_FOLDERS = ("images", "documents", "clips")
# Part of the fingerprint. Raise it whenever equal settings give different files.
_GENERATION = 2
_HELD_OUT_GROUPS = 0.2
_QUALITIES = (75, 95)  # of JPEGs of scenes that are drawn again

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Item:
    """One thing to write: its lines of `captions.jsonl`, and for each file the function that makes the bytes."""

    lines: list[dict[str, str | int]]
    files: dict[str, Callable[[], bytes]] = field(default_factory=dict)


def make_corpus(
    folder: Path, config: CorpusConfig, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Write the corpus into `folder` and return source -> number of samples, with the names of `read_folder`.

    A finished corpus of the same settings stays as it is, an interrupted one is resumed, and one of other settings is
    replaced. With equal versions of the libraries, equal settings give equal bytes. `on_progress(done, total)` is
    called after each item. There must be one writer at a time.

    Raises `UserError` if the folder holds anything else, or if the settings need more combinations than exist.
    """
    if _is_complete(folder, config):
        return num_samples(config)
    items = list(_items(config))
    _prepare(folder, config)
    for done, item in enumerate(items, start=1):
        for name, make_bytes in item.files.items():
            _write_once(folder / name, make_bytes)
        if on_progress:
            on_progress(done, len(items))
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for item in items for line in item.lines)
    (folder / CAPTIONS).write_text("".join(lines), encoding="utf-8")
    (folder / BUILDING).replace(folder / COMPLETE)
    return num_samples(config)


def num_samples(config: CorpusConfig) -> dict[str, int]:
    """Return source -> number of samples."""
    classes = dict.fromkeys(QUESTIONS, config.num_classified) if config.num_classified else {}
    return {
        "text_image": config.num_images + config.num_repeated * config.repeats,
        "image_text_image": config.num_composed,
        "text_page": config.num_documents * config.pages_per_document,
        "text_video": config.num_clips,
        "text_text": config.num_texts,
    } | classes


def fingerprint(config: CorpusConfig) -> str:
    """Return the SHA-256, in hex, of everything that decides what is written."""
    return hashlib.sha256(f"{_GENERATION} {config.model_dump_json()}".encode()).hexdigest()


def _is_complete(folder: Path, config: CorpusConfig) -> bool:
    marker = folder / COMPLETE
    return marker.is_file() and marker.read_text() == fingerprint(config)


def _prepare(folder: Path, config: CorpusConfig) -> None:
    """Make the folder hold `.building` with the fingerprint, and no file of other settings.

    The marker of an older corpus stays until its files are deleted, so that the folder is always known as a corpus.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(str(folder), "is not a folder", "name one that is empty or does not exist")
    folder.mkdir(parents=True, exist_ok=True)
    building, complete = folder / BUILDING, folder / COMPLETE
    if complete.exists():
        complete.replace(building)
    if not building.exists() and any(path.name not in (MARK, LEASE) for path in folder.iterdir()):
        raise UserError(str(folder), "holds files that are not a synthetic corpus", "name an empty folder")
    if not building.exists() or building.read_text() != fingerprint(config):
        for name in _FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CAPTIONS).unlink(missing_ok=True)
        building.write_text(fingerprint(config))
    for name in _FOLDERS:
        (folder / name).mkdir(exist_ok=True)


def _write_once(path: Path, make_bytes: Callable[[], bytes]) -> None:
    """Write a file atomically, unless it exists: an existing file is complete."""
    if not path.exists():
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(make_bytes())
        part.replace(path)


def _items(config: CorpusConfig) -> Iterator[_Item]:
    """Yield everything to write, in the order of the captions. Nothing is drawn until its bytes are requested."""
    edits, texts = config.num_images, config.num_images + config.num_composed  # where their scenes begin
    pages_each = config.pages_per_document
    scenes = _distinct(all_scenes(), texts + config.num_texts, config, "num_images + num_composed + num_texts")
    pages = _distinct(all_pages(), config.num_documents * pages_each, config, "num_documents * pages_per_document")
    clips = _distinct(all_clips(), config.num_clips, config, "num_clips")
    images = _with_hard_negatives(config, scenes[:edits], set(scenes[edits:]))
    reports = [pages[start : start + pages_each] for start in range(0, len(pages), pages_each)]
    return chain(
        (_image_item(config, number, scene) for number, scene in enumerate(images)),
        (_composed_item(config, number, target) for number, target in enumerate(scenes[edits:texts])),
        (_document_item(config, number, report) for number, report in enumerate(reports)),
        (_clip_item(config, number, clip) for number, clip in enumerate(clips)),
        (_text_item(config, number, scene) for number, scene in enumerate(scenes[texts:])),
        _class_items(config),
    )


def _distinct(space: Sequence[_T], count: int, config: CorpusConfig, setting: str) -> list[_T]:
    if count > len(space):
        raise UserError(setting, f"{count} different ones are asked for, {len(space)} exist", "ask for fewer")
    return _rng(config, setting).sample(space, count)


def _with_hard_negatives(config: CorpusConfig, scenes: list[Scene], others: set[Scene]) -> list[Scene]:
    """The scenes with the last ones replaced by neighbors of the first ones, the same number for each. All distinct,
    and none of `others`.
    """
    num_hard = round(config.hard_fraction * len(scenes))
    anchors = scenes[: len(scenes) - num_hard]
    taken = others | set(anchors)
    rng = _rng(config, "hard negatives")
    waiting = [rng.sample(near, len(near)) for near in map(neighbors, anchors)]
    hard: list[Scene] = []
    while len(hard) < num_hard and (waiting := [near for near in waiting if near]):
        for near in waiting[: num_hard - len(hard)]:
            if (scene := near.pop()) not in taken:
                hard.append(scene)
                taken.add(scene)
    if len(hard) < num_hard:
        problem = f"{num_hard} neighbors of {len(anchors)} scenes are asked for, {len(hard)} are free"
        raise UserError("hard_fraction", problem, "lower it")
    return anchors + hard


def _rng(config: CorpusConfig, purpose: str) -> Random:
    """Return a generator for one purpose, so that a file does not depend on what was drawn before."""
    return Random(f"{config.seed} {purpose}")


def _image_item(config: CorpusConfig, number: int, scene: Scene) -> _Item:
    name = f"images/{number:05d}{'.png' if number % 8 == 7 else '.jpg'}"
    line: dict[str, str | int] = {
        "file": name,
        "caption": _rng(config, f"caption of {name}").choice(scene.wordings()),
    }
    item = _Item([line], {name: partial(_image_bytes, config, name, scene)})
    if number < config.num_repeated:
        line["split"] = "train"
        for ordinal in range(config.repeats):
            again = f"images/{number:05d}-again-{ordinal:02d}.jpg"
            quality = _rng(config, f"quality of {again}").randint(*_QUALITIES)
            item.lines.append(line | {"file": again})
            item.files[again] = partial(_image_bytes, config, again, scene, quality=quality)
    return item


def _composed_item(config: CorpusConfig, number: int, target: Scene) -> _Item:
    """Return a pair whose images differ in sizes and exact places, with a dark reference. Targets are distinct.

    With equal backgrounds, an untrained model would find the target by its similarity to the reference.
    """
    before, after = (f"images/edit-{number:05d}-{end}.jpg" for end in ("before", "after"))
    reference, instruction = edit_into(target, _rng(config, f"edit into {after}"))
    return _Item(
        [{"query_file": before, "query": instruction, "file": after}],
        {
            before: partial(_image_bytes, config, before, reference, at_night=True),
            after: partial(_image_bytes, config, after, target),
        },
    )


def _document_item(config: CorpusConfig, number: int, pages: Sequence[Page]) -> _Item:
    name = f"documents/{number:04d}.pdf"
    rng = _rng(config, f"captions of {name}")
    return _Item(
        [{"file": name, "page": i, "caption": rng.choice(page.wordings())} for i, page in enumerate(pages)],
        {name: partial(_document_bytes, config, name, pages)},
    )


def _clip_item(config: CorpusConfig, number: int, clip: Clip) -> _Item:
    name = f"clips/{number:05d}.mp4"
    caption = _rng(config, f"caption of {name}").choice(clip.wordings())
    return _Item([{"file": name, "caption": caption}], {name: partial(_clip_bytes, config, name, clip)})


def _text_item(config: CorpusConfig, number: int, scene: Scene) -> _Item:
    query, positive = _rng(config, f"text {number}").sample(scene.wordings(), 2)
    return _Item([{"query": query, "positive": positive}])


def _class_items(config: CorpusConfig) -> Iterator[_Item]:
    """Yield the images of each source, which uses all groups in its own order. All sources hold out the same groups."""
    groups = list(all_groups())
    held_out = set(_rng(config, "held-out groups").sample(groups, round(_HELD_OUT_GROUPS * len(groups))))
    for source, question in QUESTIONS.items():
        shuffled = _rng(config, f"order of {source}").sample(groups, len(groups))
        for number, group in enumerate(islice(cycle(shuffled), config.num_classified)):
            name = f"images/{source}-{number:05d}.jpg"
            line: dict[str, str | int] = {
                "query_file": name,
                "positive": question.answer(group),
                "source": source,
                "instruction": question.instruction,
                "split": "held_out" if group in held_out else "train",
            }
            yield _Item([line], {name: partial(_group_bytes, config, name, group)})


def _image_bytes(config: CorpusConfig, name: str, scene: Scene, *, at_night: bool = False, quality: int = 90) -> bytes:
    image = draw_scene(scene, config.image_px, _rng(config, name), at_night=at_night)
    return encode_image(image, PurePosixPath(name).suffix, quality)


def _group_bytes(config: CorpusConfig, name: str, group: Group) -> bytes:
    return encode_image(draw_group(group, config.image_px, _rng(config, name)), PurePosixPath(name).suffix)


def _document_bytes(config: CorpusConfig, name: str, pages: Sequence[Page]) -> bytes:
    return draw_document(pages, f"Report {PurePosixPath(name).stem}", _rng(config, name), config.pdf_library)


def _clip_bytes(config: CorpusConfig, name: str, clip: Clip) -> bytes:
    return encode_clip(draw_clip(clip, config.image_px, config.clip_frames, _rng(config, name)))
