"""The synthetic corpus: the same bytes each time, every file opens, every caption is true of the pixels."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import av
import numpy as np
import pymupdf
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.errors import UserError
from pipelines.synthetic.classes import QUESTIONS, Group, all_groups, draw_group
from pipelines.synthetic.clips import Clip, all_clips, draw_clip, encode_clip
from pipelines.synthetic.config import CorpusConfig
from pipelines.synthetic.corpus import fingerprint, make_corpus
from pipelines.synthetic.documents import Page, all_pages, draw_document
from pipelines.synthetic.scenes import Scene, all_scenes, draw_scene, edit_into, neighbors
from pipelines.synthetic.shapes import Thing, all_pairs

# Odd numbers throughout; 35 pages, 17 images of which 2 are PNGs.
CONFIG = CorpusConfig(
    seed=5, num_images=17, num_composed=13, num_documents=5, pages_per_document=7, num_clips=11, num_texts=9
)
RGB = {
    "red": (214, 36, 40),
    "orange": (250, 128, 10),
    "yellow": (250, 210, 30),
    "green": (40, 150, 70),
    "cyan": (50, 195, 215),
    "blue": (35, 80, 205),
    "purple": (125, 50, 170),
    "pink": (245, 135, 190),
}
COLOUR = "|".join(RGB)
SHAPE = "circle|square|triangle|star|cross|ring|heart|bar chart"
THING = rf"an? ({COLOUR}) ({SHAPE})"
GROUND = rf"on an? ({COLOUR}) background"
RED_CIRCLE, BLUE_STAR = Thing("circle", "red"), Thing("star", "blue")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, CONFIG)
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def centres(image: Image.Image | np.ndarray, colours: tuple[str, ...]) -> list[tuple[float, float]]:
    """Centre (x, y) of the pixels of each colour, in fractions of the image; at least 0.3% of it must have it."""
    pixels = np.asarray(image, dtype=np.int32)
    found = []
    for colour in colours:
        rows, columns = np.nonzero(np.abs(pixels - RGB[colour]).max(axis=-1) < 40)
        assert rows.size > 0.003 * pixels.shape[0] * pixels.shape[1], f"hardly any {colour}"
        found.append((columns.mean() / pixels.shape[1], rows.mean() / pixels.shape[0]))
    return found


def stands(image: Image.Image | np.ndarray, colour: str, relation: str, other: str) -> bool:
    (x, y), (other_x, other_y) = centres(image, (colour, other))
    return {
        "above": y < other_y - 0.2,
        "below": y > other_y + 0.2,
        "left": x < other_x - 0.2,
        "right": x > other_x + 0.2,
    }[relation]


def ground_of(image: Image.Image | np.ndarray) -> str:
    """The colour nearest to that of the first pixel."""
    corner = np.asarray(image, dtype=np.int32)[0, 0]
    return min(RGB, key=lambda name: np.abs(corner - RGB[name]).max())


RELATION = {
    "above": "above",
    "below": "below",
    "on top of": "above",
    "at the top and": "above",
    "to the left of": "left",
    "on the left of": "left",
    "on the left and": "left",
    "to the right of": "right",
}


def relation_told(caption: str) -> tuple[str, str, str]:
    """(colour, relation, other colour) of a scene's caption."""
    found = re.fullmatch(rf"(?:there is )?{THING} (.+?) {THING}(?: at the bottom| on the right)? {GROUND}", caption)
    assert found, caption
    return found[1], RELATION[found[3]], found[4]


def video_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# --- the whole corpus


def test_equal_settings_give_equal_bytes(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "again", CONFIG)
    assert contents(tmp_path / "again") == contents(corpus)


def test_another_seed_gives_another_corpus(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path, CONFIG.model_copy(update={"seed": 6}))
    first, second = contents(corpus), contents(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] == second[name]] == []


def test_samples_and_files_are_as_many_as_asked_for(corpus: Path) -> None:
    assert make_corpus(corpus, CONFIG) == {
        "text_image": 17,
        "image_text_image": 13,
        "text_page": 35,
        "text_video": 11,
        "text_text": 9,
    }
    forms = Counter(tuple(line) for line in lines(corpus))
    assert forms == {
        ("file", "caption"): 17 + 11,
        ("query_file", "query", "file"): 13,
        ("file", "page", "caption"): 35,
        ("query", "positive"): 9,
    }
    suffixes = Counter(path.suffix for path in corpus.rglob("*.*") if not path.name.startswith("."))
    assert suffixes == {".jpg": 15 + 26, ".png": 2, ".pdf": 5, ".mp4": 11, ".jsonl": 1}


def test_every_file_is_named_by_a_line_and_every_line_names_a_file(corpus: Path) -> None:
    named = {line[key] for line in lines(corpus) for key in ("file", "query_file") if key in line}
    assert named == {name for name in contents(corpus) if "/" in name}


def test_no_two_samples_ask_for_the_same_thing(corpus: Path) -> None:
    asked = [line.get("caption") or line.get("positive") for line in lines(corpus) if "query_file" not in line]
    assert len(set(asked)) == len(asked) == 72
    targets = [line["file"] for line in lines(corpus) if "query_file" in line]
    assert len({(corpus / name).read_bytes() for name in targets}) == 13


def test_every_image_opens_and_its_caption_is_true_of_the_pixels(corpus: Path) -> None:
    captioned = [line for line in lines(corpus) if line.get("file", "").startswith("images/") and "caption" in line]
    assert len(captioned) == 17
    for line in captioned:
        with Image.open(corpus / line["file"]) as image:
            assert (image.size, image.mode) == ((112, 112), "RGB")
            assert stands(image, *relation_told(line["caption"])), line
            assert ground_of(image) == line["caption"].split()[-2]


def test_every_clip_decodes_whole_and_its_colours_are_in_each_frame(corpus: Path) -> None:
    clips = [line for line in lines(corpus) if line.get("file", "").endswith(".mp4")]
    for line in clips:
        frames = video_frames(corpus / line["file"])
        assert [frame.shape for frame in frames] == [(112, 112, 3)] * 8
        *colours, ground = re.findall(COLOUR, line["caption"])
        assert len(colours) == 2
        for frame in frames:
            centres(frame, tuple(colours))
            assert ground_of(frame) == ground


def test_every_page_holds_its_topic_as_text_and_its_colours_in_their_order(corpus: Path) -> None:
    pages = [line for line in lines(corpus) if "page" in line]
    assert [line["page"] for line in pages] == [0, 1, 2, 3, 4, 5, 6] * 5
    for line in pages:
        with pymupdf.open(corpus / line["file"]) as document:
            page = document[line["page"]]
            topic = re.search(r"(?:report on|page about) ([a-z ]+?)(?: with|$)", line["caption"])
            assert topic
            assert page.get_text().startswith(f"{topic[1].capitalize()}\n")
            pixmap = page.get_pixmap(matrix=pymupdf.Matrix(0.27, 0.27))
        pixels = np.frombuffer(pixmap.samples, np.uint8).reshape(pixmap.height, pixmap.width, 3)
        assert pixels.shape[:2] == (161, 114)
        found = re.search(
            rf"({COLOUR}) (bar|line|pie|table)[a-z ]*? (above|below) an? ({COLOUR}) (\w+)", line["caption"]
        )
        assert found
        assert {found[2], found[5]} in ({"bar", "table"}, {"line", "table"}, {"pie", "table"})
        (banner,) = re.findall(rf"({COLOUR}) banner", line["caption"])
        assert ground_of(pixels) == banner
        assert stands(pixels, found[1], found[3], found[4]), line


def test_every_text_pair_describes_the_same_scene_in_two_ways(corpus: Path) -> None:
    mirrored = {"above": "below", "below": "above", "left": "right", "right": "left"}
    pairs = [(line["query"], line["positive"]) for line in lines(corpus) if "positive" in line]
    assert len(pairs) == 9
    for query, positive in pairs:
        assert query != positive
        colour, relation, other = relation_told(positive)
        assert relation_told(query) in {(colour, relation, other), (other, mirrored[relation], colour)}


# --- what an ablation plants

PLANTED = CONFIG.model_copy(update={"num_repeated": 3, "repeats": 4, "num_classified": 300})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    make_corpus(folder, PLANTED)
    return folder


def test_captions_and_lossless_pixels_of_a_seed_are_known(corpus: Path) -> None:
    """Neither depends on the version of an encoder. Where they change, `_GENERATION` has to be raised."""
    captions = hashlib.sha256((corpus / "captions.jsonl").read_bytes()).hexdigest()
    assert captions == "3cfcb9ccb7fdc44d3e1cfc7e262861535a28934f7804803329106c196fb0da76"
    pixels = hashlib.sha256()
    for path in sorted(corpus.rglob("*.png")):
        with Image.open(path) as image:
            pixels.update(image.tobytes())
    assert pixels.hexdigest() == "9389fe14c02040506b76c586896b73fc89ccc03939ff9c8e24105da0b46c1055"


def test_what_is_planted_leaves_every_other_file_as_it_is(corpus: Path, planted: Path) -> None:
    without = {name: content for name, content in contents(corpus).items() if "/" in name}
    with_it = contents(planted)
    assert {name: with_it[name] for name in without} == without
    assert len(with_it) - 2 == len(without) + 3 * 4 + 3 * 300
    assert make_corpus(planted, PLANTED)["text_image"] == 17 + 3 * 4
    assert {make_corpus(planted, PLANTED)[source] for source in QUESTIONS} == {300}


def test_a_scene_drawn_again_has_the_caption_and_other_bytes(planted: Path) -> None:
    drawings: dict[str, list[dict]] = {}
    for line in lines(planted):
        if "caption" in line and line["file"].startswith("images/"):
            drawings.setdefault(line["caption"], []).append(line)
    assert sorted(map(len, drawings.values())) == [1] * 14 + [5] * 3
    for caption, group in drawings.items():
        assert [line.get("split") for line in group] == (["train"] * 5 if len(group) == 5 else [None])
        assert len({hashlib.sha256((planted / line["file"]).read_bytes()).digest() for line in group}) == len(group)
        for line in group:
            with Image.open(planted / line["file"]) as image:
                assert stands(image, *relation_told(caption))


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_hard_negatives_differ_from_another_scene_in_exactly_one_attribute(share: float, tmp_path: Path) -> None:
    config = CorpusConfig(num_images=40, hard_fraction=share, num_composed=9, num_documents=0, num_clips=0, num_texts=9)
    make_corpus(tmp_path, config)
    found = [line["caption"] for line in lines(tmp_path) if "caption" in line]
    scene_of = {wording: scene for scene in all_scenes() for wording in scene.wordings()}
    scenes = [scene_of[caption] for caption in found]
    assert len(set(scenes)) == 40
    num_hard = round(share * 40)
    anchors, hard = scenes[:-num_hard], scenes[-num_hard:]

    def attributes(scene: Scene) -> tuple[str, ...]:
        ends = (scene.first, scene.second)
        return (*(thing.shape for thing in ends), *(thing.colour for thing in ends), scene.relation, scene.ground)

    for scene in hard:
        unlike = [sum(a != b for a, b in zip(attributes(scene), attributes(one), strict=True)) for one in anchors]
        assert min(unlike) == 1
    others = {scene_of[line["positive"]] for line in lines(tmp_path) if "positive" in line}
    assert not others & set(scenes)
    make_corpus(tmp_path / "default", config.model_copy(update={"hard_fraction": 0.0}))
    before = [line["caption"] for line in lines(tmp_path / "default") if "caption" in line]
    assert [scene_of[caption] for caption in before[:-num_hard]] == anchors


def test_neighbors_of_a_scene_are_all_others_with_one_change() -> None:
    near = neighbors(Scene(RED_CIRCLE, BLUE_STAR, "above", "pink"))
    assert len(set(near)) == len(near) == 5 + 5 + 5 + 6 + 6 + 1
    assert set(near) <= set(all_scenes())


def test_more_neighbors_than_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hard_fraction: 78 neighbors of 2 scenes are asked for, 50 are free"):
        make_corpus(tmp_path / "corpus", CorpusConfig(num_images=80, hard_fraction=0.98))
    with pytest.raises(ValidationError, match="num_repeated=3 is more than num_images=2"):
        CorpusConfig(num_images=2, num_repeated=3)


def test_classes_are_true_of_the_pixels_and_held_out_by_combination(planted: Path) -> None:
    listed = [line for line in lines(planted) if line.get("source") in QUESTIONS]
    splits: dict[str, Counter] = {source: Counter() for source in QUESTIONS}
    for line in listed:
        splits[line["source"]][line["split"], line["positive"]] += 1
        if line["source"] == "colours":
            with Image.open(planted / line["query_file"]) as image:
                centres(image, (line["positive"],))
    for source, classes in (("shapes", 8), ("colours", 8), ("numbers", 4)):
        assert len({name for split, name in splits[source] if split == "train"}) == classes
        held_out = sum(count for (split, _), count in splits[source].items() if split == "held_out")
        assert 51 <= held_out <= 51 + 44, "a fifth of 256 combinations once, and of 44 of them twice"
    assert {line["instruction"] for line in listed} == {question.instruction for question in QUESTIONS.values()}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_group_has_as_many_things_as_it_says_and_none_at_the_border(count: int) -> None:
    for seed in range(20):
        group = Group(Thing("square", "red"), count)
        pixels = np.asarray(draw_group(group, 112, Random(seed)), dtype=np.int32)
        painted = (pixels != pixels[0, 0]).any(axis=2)
        quarters = painted.reshape(2, 56, 2, 56).any(axis=(1, 3))
        assert quarters.sum() == count
        assert not np.concatenate([*painted[55:57], *painted.T[55:57]]).any(), "apart, each in its own quarter"
        assert not np.concatenate([painted[0], painted[-1], painted[:, 0], painted[:, -1]]).any()
    assert len(set(all_groups())) == 8 * 8 * 4
    assert [question.answer(group) for question in QUESTIONS.values()][:2] == ["square", "red"]
    assert (
        QUESTIONS["numbers"].answer(group) == ("one object", "two objects", "three objects", "four objects")[count - 1]
    )


# --- marker and resumption


def test_a_complete_corpus_is_left_alone(corpus: Path) -> None:
    assert (corpus / ".complete").read_text() == fingerprint(CONFIG)
    assert not (corpus / ".building").exists()
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    calls: list[tuple[int, int]] = []
    make_corpus(corpus, CONFIG, lambda done, total: calls.append((done, total)))
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_an_interrupted_corpus_is_continued_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 17 + 13 + 5 + 11 + 9
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path, CONFIG, stop)
    assert not (tmp_path / ".complete").exists()
    assert not (tmp_path / "captions.jsonl").exists()
    (tmp_path / "images/edit-00001-after.jpg").unlink()
    (tmp_path / "images/.edit-00001-after.jpg.part").write_bytes(b"half")
    kept = (tmp_path / "images/00003.jpg").stat().st_mtime_ns
    make_corpus(tmp_path, CONFIG)
    assert (tmp_path / "images/00003.jpg").stat().st_mtime_ns == kept
    assert contents(tmp_path) == contents(corpus)


def test_other_settings_replace_the_corpus_and_leave_nothing_of_it(tmp_path: Path) -> None:
    small = CorpusConfig(num_images=3, num_composed=1, num_documents=1, pages_per_document=2, num_clips=2, num_texts=1)
    make_corpus(tmp_path, small)
    fewer = small.model_copy(update={"num_images": 2, "num_clips": 0})
    make_corpus(tmp_path, fewer)
    assert sorted(contents(tmp_path)) == [
        ".complete",
        "captions.jsonl",
        "documents/0000.pdf",
        "images/00000.jpg",
        "images/00001.jpg",
        "images/edit-00000-after.jpg",
        "images/edit-00000-before.jpg",
    ]
    assert (tmp_path / ".complete").read_text() == fingerprint(fewer)


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/holiday.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds files that are not a synthetic corpus; name an empty folder"):
        make_corpus(tmp_path, CONFIG)
    assert contents(tmp_path) == {"images/holiday.jpg": b"precious"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("not a folder")
    with pytest.raises(UserError, match="is not a folder"):
        make_corpus(tmp_path / "corpus", CONFIG)


def test_more_combinations_than_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_texts: 37633 different ones are asked for, 37632 exist"):
        make_corpus(tmp_path / "corpus", CorpusConfig(num_images=37_000, num_composed=600, num_texts=33))
    assert not (tmp_path / "corpus").exists()


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of 2"):
        CorpusConfig(image_px=113)


# --- scenes, clips and pages


def test_every_combination_exists_once() -> None:
    for space, size in ((all_pairs, 3136), (all_scenes, 37_632), (all_clips, 301_056), (all_pages, 24_192)):
        assert len(set(space())) == len(space()) == size


def test_wordings_of_a_scene() -> None:
    assert Scene(RED_CIRCLE, Thing("bar chart", "orange"), "above", "cyan").wordings() == [
        "a red circle above an orange bar chart on a cyan background",
        "an orange bar chart below a red circle on a cyan background",
        "there is a red circle on top of an orange bar chart on a cyan background",
        "a red circle at the top and an orange bar chart at the bottom on a cyan background",
    ]
    assert Scene(RED_CIRCLE, BLUE_STAR, "left of", "orange").wordings() == [
        "a red circle to the left of a blue star on an orange background",
        "a blue star to the right of a red circle on an orange background",
        "there is a red circle on the left of a blue star on an orange background",
        "a red circle on the left and a blue star on the right on an orange background",
    ]


def test_shapes_differ_by_far_more_than_their_drawing_varies() -> None:
    def silhouette(shape: str, seed: int) -> np.ndarray:
        scene = Scene(Thing(shape, "red"), Thing("circle" if shape != "circle" else "square", "blue"), "above", "cyan")
        pixels = np.asarray(draw_scene(scene, 112, Random(seed)), dtype=np.int32)
        rows, columns = np.nonzero(np.abs(pixels - RGB["red"]).max(axis=-1) < 40)
        box = (pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] - RGB["red"]).any(axis=-1)
        return np.asarray(Image.fromarray(box).resize((32, 32)))

    shapes = SHAPE.split("|")
    first, second = ({shape: silhouette(shape, seed) for shape in shapes} for seed in (1, 2))
    for shape in shapes:
        differences = {other: np.mean(first[shape] != second[other]) for other in shapes}
        assert min(differences, key=differences.__getitem__) == shape
        assert sorted(differences.values())[1] > 0.08


def test_things_lie_within_the_image_and_apart() -> None:
    for seed in range(60):
        scene = Scene(Thing("square", "red"), Thing("circle", "blue"), ("above", "left of")[seed % 2], "cyan")
        pixels = np.asarray(draw_scene(scene, 112, Random(seed)), dtype=np.int32)
        paper = pixels[0, 0]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == paper).all()
        along = (pixels != paper).any(axis=2).any(axis=1 - seed % 2)
        assert np.abs(np.diff(along.astype(int))).sum() == 4, "two stretches with paper between them"


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_changes_what_it_says_and_nothing_else(seed: int) -> None:
    target = Scene(RED_CIRCLE, BLUE_STAR, "left of", "pink")
    reference, sentence = edit_into(target, Random(seed))
    instruction, ground = sentence.split(", ")
    assert ground == "on a pink background"
    things = {thing.shape: thing.colour for thing in (reference.first, reference.second)}
    if found := re.fullmatch(rf"(?:make the|change the colour of the) ({SHAPE}) (?:to )?({COLOUR})", instruction):
        assert things[found[1]] != found[2]
        things[found[1]] = found[2]
    elif found := re.fullmatch(rf"(?:replace|turn) the ({SHAPE}) (?:with|into) an? ({SHAPE})", instruction):
        things = {found[2] if shape == found[1] else shape: colour for shape, colour in things.items()}
    else:
        assert instruction in ("swap the positions", "let the two objects trade places")
        things = dict(reversed(things.items()))
    assert list(things.items()) == [("circle", "red"), ("star", "blue")]
    assert (reference.relation, reference.ground) == (target.relation, target.ground)


def test_all_three_kinds_of_edit_occur() -> None:
    target = Scene(RED_CIRCLE, BLUE_STAR, "above", "pink")
    verbs = {edit_into(target, Random(seed))[1].split()[0] for seed in range(60)}
    assert verbs == {"make", "change", "replace", "turn", "swap", "let"}


@pytest.mark.parametrize(
    ("motion", "place", "caption"),
    [
        ("right", "below", "a red circle moving to the right below a blue star"),
        ("left", "above", "a red circle moving to the left above a blue star"),
        ("up", "to the left of", "a red circle moving upwards to the left of a blue star"),
        ("down", "to the right of", "a red circle moving downwards to the right of a blue star"),
        ("grow", "above", "a red circle growing above a blue star"),
        ("shrink", "to the right of", "a red circle shrinking to the right of a blue star"),
    ],
)
def test_a_clip_shows_the_motion_its_caption_describes(motion: str, place: str, caption: str, tmp_path: Path) -> None:
    clip = Clip(RED_CIRCLE, BLUE_STAR, motion, place, "green")
    assert clip.wordings()[0] == f"{caption} on a green background"
    (tmp_path / "clip.mp4").write_bytes(encode_clip(draw_clip(clip, 90, 11, Random(0))))
    frames = video_frames(tmp_path / "clip.mp4")
    assert [frame.shape for frame in frames] == [(90, 90, 3)] * 11
    first, last = centres(frames[0], ("red", "blue")), centres(frames[-1], ("red", "blue"))
    assert last[1] == pytest.approx(first[1], abs=0.01), "the star stays"
    area = [int((np.abs(frame.astype(int) - RGB["red"]).max(axis=-1) < 40).sum()) for frame in (frames[0], frames[-1])]
    moved = {"right": (0.48, 0), "left": (-0.48, 0), "down": (0, 0.48), "up": (0, -0.48)}.get(motion, (0, 0))
    assert np.subtract(last[0], first[0]) == pytest.approx(moved, abs=0.03)
    growth = {"grow": 1 / 0.45**2, "shrink": 0.45**2}.get(motion, 1)
    assert area[1] / area[0] == pytest.approx(growth, rel=0.3)
    relation = place.removeprefix("to the ").removesuffix(" of")
    (x, y), (still_x, still_y) = first
    side = {"above": still_y - y, "below": y - still_y, "left": still_x - x, "right": x - still_x}[relation]
    assert side > 0.4


def test_a_clip_is_the_same_file_in_every_run() -> None:
    frames = draw_clip(Clip(RED_CIRCLE, BLUE_STAR, "right", "below", "green"), 90, 11, Random(0))
    data = encode_clip(frames)
    assert data == encode_clip(frames)
    # What x264 says of itself in the file. Without these, other bytes are too rare to wait for.
    assert all(setting in data for setting in (b" threads=1 ", b" mbtree=0 "))


@pytest.mark.parametrize("chart", ["bar", "line", "pie"])
def test_a_page_has_the_same_numbers_in_text_table_and_chart(chart: str) -> None:
    page = Page("tea exports", chart, "orange", "green", "red", chart_first=True)
    assert page.wordings() == [
        f"report on tea exports with a green {chart} chart above a red table and an orange banner",
        f"page about tea exports with an orange banner: a red table below a green {chart} chart",
        f"an orange banner, a green {chart} chart above a red table in a report on tea exports",
    ]
    with pymupdf.open(stream=draw_document([page], "Report 0007", Random(3), "pymupdf")) as document:
        text = document[0].get_text().splitlines()
    assert text[0] == "Tea exports"
    assert text[1] == "This page sums up a year of tea exports, quarter by quarter."
    assert text[-1] == "Report 0007, page 1 of 1"
    start = text.index("Crates")
    counts = [int(cell) for cell in text[start + 1 : start + 5]]
    best = max(counts)
    assert f"The best was Q{counts.index(best) + 1} with {best} crates;" in text[2]
    assert [int(cell.rstrip("%")) for cell in text[start + 6 : start + 10]] == [
        round(100 * count / sum(counts)) for count in counts
    ]
    if chart != "pie":
        assert [int(line) for line in text[3:7]] == counts
