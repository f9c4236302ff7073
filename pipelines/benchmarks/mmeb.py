"""MMEB-V2 images and videos: lists next to folders of pictures. (Its document sets: `pages.py`.)

What is assumed, from the loaders that the benchmark's authors publish (VLM2Vec, January 2026); the files themselves
were not at hand:

    image-tasks/{dataset}/test-*.parquet        qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text[], tgt_img_path[]
    image-tasks/{path}                          pictures, as unpacked from mmeb_v1.tar.gz, named by the lists
    video-tasks/{dataset}/test-*.parquet        or .jsonl; columns in `Row` and below
    video-tasks/frames/{group}/{dataset}/{id}/  pictures of one video, from the archives of TIGER-Lab/MMEB-V2
    .../{video}/query, positive*, others        moments: the video asked about, and ten clips of it

The authors' scripts read the lists from the hub; their places on disk follow their table of local folders, and names
of parts are those of the hub. The first target of an image set is the relevant one. Not taken over: the line breaks
that keep their first version's numbers, and names as keys (`types.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipelines.benchmarks.files import Line, find_parts, read_parts
from pipelines.benchmarks.types import Dataset, Query, Row, file_in, make_item
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import FileRef, MediaKind
from pipelines.texts import decode_text, lines_of

_IMAGE_MARK = "<|image_1|>"
Visuals = list[tuple[MediaKind, FileRef]]
Asked = tuple[Item, Sequence[Item], Sequence[Item]]
"""A query, its candidates, and which of them are relevant."""


def read_images(row: Row, root: Path) -> Dataset:
    """Any of the 36 image sets. Targets of text alone carry no instruction, as in the protocol."""
    media = root / row.media
    columns = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text")

    @cache
    def target(text: str, path: str, instruction: str) -> Item:
        name = f"{path}:{text}" if path and text else path or text
        return make_item(name, text, _pictures(media, path), root, "p", instruction if path else "")

    def asked() -> Iterator[Asked]:
        for number, line in enumerate(_lines(row, root, columns, ("tgt_img_path",))):
            pictures = _pictures(media, line["qry_img_path"])
            query = make_item(str(number), _text(line["qry_text"]), pictures, root, "q", _text(line["qry_inst"]))
            texts, paths = list(line["tgt_text"] or []), list(line.get("tgt_img_path") or [])
            paths = paths or [""] * len(texts)
            texts = texts or [""] * len(paths)
            if len(texts) != len(paths):
                problem = f"has {len(texts)} target texts and {len(paths)} target images"
                raise UserError(f"{row.name} {number}", problem, "fetch it again")
            pool = [
                target(_text(text), path or "", _text(line["tgt_inst"]))
                for text, path in zip(texts, paths, strict=True)
            ]
            yield query, pool, pool[:1]

    return _dataset(row, asked())


def read_video_class(row: Row, root: Path) -> Dataset:
    """Read videos whose classes are the candidates of all: columns video_id, pos_text, optional neg_text[].

    The protocol keeps the names of the classes in its code. Here they come from `labels.txt` next to the list (one a
    line), or from the list itself if it names all of them. With fewer classes the task would be easier.
    """
    lines = list(_lines(row, root, ("video_id", "pos_text"), ("neg_text",)))
    labels = dict.fromkeys(line["pos_text"] for line in lines)
    labels |= dict.fromkeys(label for line in lines for label in _listed(line.get("neg_text")))
    names = root / row.data / "labels.txt"
    if names.is_file():
        given = dict.fromkeys(line for line in lines_of(decode_text(names.read_bytes())) if line.strip())
        if unknown := [label for label in labels if label not in given]:
            raise UserError(str(names), f"lacks {unknown[0]!r}, which the list names", "write it as the list does")
        labels = given
    if len(labels) != row.num_classes:
        problem = f"the list names {len(labels)} of {row.num_classes} classes"
        raise UserError(f"{root / row.data}", problem, f"write all of them into {names}, one a line")
    classes = {label: make_item(label, label, (), root, "p") for label in labels}

    def asked() -> Iterator[Asked]:
        for number, line in enumerate(lines):
            query = _video_query(row, root, line["video_id"], "", name=f"{number}:{line['video_id']}")
            yield query, list(classes.values()), [classes[line["pos_text"]]]

    return _dataset(row, asked())


def read_video_choice(row: Row, root: Path) -> Dataset:
    """Videos with names to choose from: columns video_id, pos_text, neg_text[], where neg_text may hold pos_text."""

    def asked() -> Iterator[Asked]:
        for number, line in enumerate(_lines(row, root, ("video_id", "pos_text", "neg_text"))):
            query = _video_query(row, root, line["video_id"], "", name=f"{number}:{line['video_id']}")
            texts = dict.fromkeys([*_listed(line["neg_text"]), line["pos_text"]])
            pool = {text: make_item(text, text, (), root, "p") for text in texts}
            yield query, list(pool.values()), [pool[line["pos_text"]]]

    return _dataset(row, asked())


def read_video_retrieval(row: Row, root: Path) -> Dataset:
    """Texts (the first, where there are several) to videos. Rows of one video share it as the relevant candidate."""

    @cache
    def video(name: str) -> Item:
        return make_item(name, "", _frames(root / row.media, name), root, "p", row.target_instruction)

    def asked() -> Iterator[Asked]:
        for number, line in enumerate(_lines(row, root, (row.id_column, row.text_column))):
            text = line[row.text_column]
            text = text if isinstance(text, str) else text[0]
            value = str(line[row.id_column])
            target = video(Path(value).stem if row.id_column == "video" else value)
            yield make_item(str(number), text, (), root, "q", row.instruction), [target], [target]

    return _dataset(row, asked())


def read_moments(row: Row, root: Path) -> Dataset:
    """A text and a video to one of its clips: columns query, video_path; the clips are the folders next to `query`."""

    def asked() -> Iterator[Asked]:
        for number, line in enumerate(_lines(row, root, ("query", "video_path"))):
            name = Path(line["video_path"]).stem
            folder = root / row.media / name
            query = make_item(f"{number}:{name}", line["query"], _frames(folder, "query"), root, "q", row.instruction)
            names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "query")
            pool = {
                clip: make_item(f"{name}/{clip}", "", _frames(folder, clip), root, "p", row.target_instruction)
                for clip in names
            }
            right = [item for clip, item in pool.items() if clip.startswith("positive")]
            if not right:
                raise UserError(str(folder), "has no folder positive*", "unpack it again")
            yield query, list(pool.values()), right

    return _dataset(row, asked())


def read_moment_seeker(row: Row, root: Path) -> Dataset:
    """A text, with or without an image or a video, to clips: columns query, positive_frames[], negative_frames[] (each
    with output_path) and input_frames, which is empty, `*.jpg` (a file `query_*.jpg`) or `*.mp4`.

    Frames of `a/b.mp4` lie in `video_frames/a_b`. What else the query shows decides its instruction.
    """
    media = root / row.media
    instructions = {
        "": row.instruction,
        ".jpg": "Select the video clip that aligns with the given text and image:",
        ".mp4": "Find the clip that corresponds to the given sentence and video segment:",
    }

    @cache
    def clip(path: str) -> Item:
        return make_item(path, "", _frames(media / "video_frames", _flat(path)), root, "p", row.target_instruction)

    def asked() -> Iterator[Asked]:
        columns = ("query", "positive_frames", "negative_frames", "input_frames")
        for number, line in enumerate(_lines(row, root, columns)):
            shown = line["input_frames"] or ""
            suffix = Path(shown).suffix
            if suffix not in instructions:
                raise UserError(f"{row.name} {number}", f"shows {shown!r}", "fetch it again")
            visuals = _frames(media / "video_frames", _flat(shown)) if suffix == ".mp4" else []
            visuals = _pictures(media, f"query_{shown}") if suffix == ".jpg" else visuals
            query = make_item(str(number), line["query"], visuals, root, "q", instructions[suffix])
            right, wrong = (
                [clip(entry["output_path"]) for entry in line[name]] for name in ("positive_frames", "negative_frames")
            )
            yield query, [*right, *wrong], right

    return _dataset(row, asked())


def read_video_qa(row: Row, root: Path) -> Dataset:
    """A video and a question with its options to the right answer. How each set writes them is in `_QUESTIONS`."""
    form = _QUESTIONS[row.name]

    def asked() -> Iterator[Asked]:
        number = 0
        for subset, lines in _subsets(row, root, form.columns):
            for line in lines:
                folder, question, options, right = form.ask(line)
                folder = f"{subset}/{folder}" if subset else folder
                query = _video_query(row, root, folder, question, name=f"{number}:{folder}")
                pool = [make_item(option, option, (), root, "p") for option in options]
                if not 0 <= right < len(pool):
                    raise UserError(f"{row.name} {number}", f"has no option {right}", "fetch it again")
                yield query, pool, [pool[right]]
                number += 1

    return _dataset(row, asked())


@dataclass(frozen=True, slots=True)
class _Question:
    """Columns of a list, and from a line the folder of the frames, the question, the answers, and which is right."""

    columns: tuple[str, ...]
    ask: Callable[[Line], tuple[str, str, list[str], int]]


def _mvbench(line: Line) -> tuple[str, str, list[str], int]:
    options = list(line["candidates"])
    right = options.index(line["answer"]) if line["answer"] in options else -1
    lettered = _lettered(options)
    return str(line["video"]), _ask(line["question"], lettered), lettered, right


def _nextqa(line: Line) -> tuple[str, str, list[str], int]:
    options = [line[f"a{number}"] for number in range(5)]
    return str(line["video"]), _ask(line["question"], _lettered(options)), options, int(line["answer"])


def _video_mme(line: Line) -> tuple[str, str, list[str], int]:
    options = list(line["options"])
    question = "\n".join([line["question"], *options])
    return str(line["videoID"]), question, list(map(_bare, options)), "ABCD".find(line["answer"])


def _egoschema(line: Line) -> tuple[str, str, list[str], int]:
    options = list(line["option"])
    question = line["question"] + " ".join(options)  # as the protocol has it
    return str(line["video_idx"]), question, list(map(_bare, options)), int(line["answer"])


def _activitynet(line: Line) -> tuple[str, str, list[str], int]:
    options = ["yes", "no"]
    right = options.index(line["answer"]) if line["answer"] in options else -1
    return f"v_{line['video_name']}", line["question"] + "? (A) yes; (B) no.", options, right


_QUESTIONS = {
    "MVBench": _Question(("question", "video", "candidates", "answer"), _mvbench),
    "NExTQA": _Question(("question", "video", "answer", "a0", "a1", "a2", "a3", "a4"), _nextqa),
    "Video-MME": _Question(("question", "videoID", "options", "answer"), _video_mme),
    "EgoSchema": _Question(("question", "video_idx", "option", "answer"), _egoschema),
    "ActivityNetQA": _Question(("question", "video_name", "answer"), _activitynet),
}


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def _ask(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *options])


def _bare(option: str) -> str:
    """`A. A dog.` is answered by `A dog`."""
    letter, dot, rest = option.partition(". ")
    return (rest if dot and len(letter) == 1 else option).strip(". ")


def _subsets(row: Row, root: Path, columns: Sequence[str]) -> Iterator[tuple[str, Iterator[Line]]]:
    """One list, or one for each folder of MVBench, which are folders of the frames too."""
    if row.name != "MVBench":
        yield "", _lines(row, root, columns)
        return
    folders = sorted(path.name for path in (root / row.data).glob("*") if path.is_dir())
    if not folders:
        raise UserError(str(root / row.data), "has no folder of a subset", f"fetch {row.source} into it")
    for folder in folders:
        parts = find_parts(root / row.data / folder, row.split, fetch=f"fetch {row.source} into {root / row.data}")
        yield folder, read_parts(parts, columns)


def _lines(row: Row, root: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Line]:
    fetch = f"fetch {row.source} into {root / row.data}"
    return read_parts(find_parts(root / row.data, row.split, row.subset, fetch), columns, optional)


def _dataset(row: Row, asked: Iterable[Asked]) -> Dataset:
    """Candidates that are listed twice are one; a query's pool is its own list, or None where all share one."""
    candidates: dict[str, Item] = {}
    queries = []
    for query, pool, relevant in asked:
        candidates |= {item.id: item for item in pool if item.id not in candidates}
        ids = tuple(dict.fromkeys(item.id for item in pool)) if row.pool == "local" else None
        queries.append(Query(query, {item.id: 1.0 for item in relevant}, ids))
    return Dataset(row, queries, list(candidates.values()), row.name)


def _video_query(row: Row, root: Path, folder: object, text: str, name: str) -> Item:
    return make_item(name, text, _frames(root / row.media, str(folder)), root, "q", row.instruction)


def _frames(folder: Path, name: str) -> Visuals:
    return [("video", FileRef(str(file_in(folder, name))))]


def _pictures(folder: Path, name: str | None) -> Visuals:
    return [("image", FileRef(str(file_in(folder, name))))] if name else []


def _text(text: str | None) -> str:
    return (text or "").replace(_IMAGE_MARK, "").strip()


def _listed(value: object) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


def _flat(path: str) -> str:
    return path.partition(".mp4")[0].replace("/", "_")
