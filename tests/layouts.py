"""Miniature copies of benchmarks, laid out on disk as the published ones, and vectors planted in place of a model."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.benchmarks.types import Dataset
from rzen.evaluation.vectors import Vectors

Lines = Sequence[Mapping[str, Any]]
WIDTH = 1024
"""Of planted vectors: more than any dataset has names of candidates."""


def put(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_parquet(path: Path, lines: Lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(line) for line in lines]), path)
    return path


def put_lines(path: Path, lines: Lines) -> Path:
    return put(path, "".join(json.dumps(line) + "\n" for line in lines))


def picture(of: str) -> bytes:
    """A JPEG file of coloured squares, others for another text."""
    pixels = np.random.default_rng(zlib.crc32(of.encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((56, 56), Image.Resampling.NEAREST).save(sink, "JPEG")
    return sink.getvalue()


def put_frames(folder: Path, count: int = 3) -> None:
    for number in range(count):
        put(folder / f"frame_{number + 1}.jpg", picture(f"{folder.name} {number}"))


def put_images(root: Path, name: str, lines: Lines) -> None:
    """An image set of MMEB-V2 and the pictures that it names."""
    put_parquet(root / f"image-tasks/{name}/test-00000-of-00001.parquet", lines)
    for line in lines:
        for name in (line["qry_img_path"], *line["tgt_img_path"]):
            if name:
                put(root / "image-tasks" / name, picture(name))


def put_pages(folder: Path, split: str, queries: Mapping[str, str], corpus: Lines, qrels: Lines) -> None:
    """A document set. `corpus` and `qrels` are the rows as published."""
    asked = [{"query-id": id, "query": text} for id, text in queries.items()]
    for name, lines in {"queries": asked, "corpus": corpus, "qrels": qrels}.items():
        put_parquet(folder / name / f"{split}-00000-of-00001.parquet", lines)


def page(name: str, content: str = "") -> dict[str, Any]:
    return {"corpus-id": name, "image": {"bytes": picture(content or name), "path": None}}


def grade(query: str, name: str, score: int) -> dict[str, Any]:
    return {"query-id": query, "corpus-id": name, "score": score}


def put_mbeir(root: Path) -> None:
    """Two tasks: texts to images of MS-COCO (2 queries, 3 images), questions on images to pages of OVEN."""
    instructions = (
        "query_modality\tcand_modality\tname\tdataset_id\tprompt_1\tprompt_2\n"
        "text\timage\tmscoco\t9\tFind the image of this caption.\tAnother prompt.\n"
        "image,text\ttext\toven\t5\tFind the page that answers.\tAnother prompt.\n"
    )
    put(root / "instructions/query_instructions.tsv", instructions)
    images = [
        {"did": f"9:{n}", "txt": None, "img_path": f"mbeir_images/{n}.jpg", "modality": "image"} for n in range(3)
    ]
    texts = [{"did": f"5:{n}", "txt": f" page {n} ", "img_path": None, "modality": "text"} for n in range(2)]
    for number in range(4):
        put(root / f"mbeir_images/{number}.jpg", picture(f"image {number}"))
    put_lines(root / "cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl", images)
    put_lines(root / "cand_pool/local/mbeir_oven_task6_cand_pool.jsonl", texts)
    put_lines(root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl", [*images, *texts])
    captions = [
        {"qid": f"9:{n}", "query_txt": f"caption {n}", "query_img_path": None, "query_modality": "text"} for n in (7, 8)
    ]
    put_lines(root / "query/test/mbeir_mscoco_task0_test.jsonl", captions)
    put(root / "qrels/test/mbeir_mscoco_task0_test_qrels.txt", "9:7 0 9:0 1 0\n9:7 0 9:2 0 0\n9:8 0 9:1 1 0\n")
    asked = {"qid": "5:1", "query_txt": "Which bird?", "query_img_path": "mbeir_images/3.jpg"}
    put_lines(root / "query/test/mbeir_oven_task6_test.jsonl", [{**asked, "query_modality": "image,text"}])
    put(root / "qrels/test/mbeir_oven_task6_test_qrels.txt", "5:1 0 5:1 1 6\n5:1 0 6:99 1 6\n")


def image_line(**fields: object) -> dict[str, object]:
    """A row of an image set of MMEB-V2, empty but for these columns."""
    empty = {"qry_inst": "", "qry_text": "", "qry_img_path": "", "tgt_inst": "", "tgt_text": [], "tgt_img_path": []}
    return {**empty, **fields}


def put_vidore(root: Path, name: str = "biomedical_lectures_v2") -> None:
    """Two queries: one with grades 2 and 1, one with a page that was graded twice; a third has no relevant page."""
    qrels = [grade("1", "3", 2), grade("1", "4", 1), grade("2", "4", 2), grade("2", "4", 1), grade("3", "4", 0)]
    queries = {"1": "first?", "2": "zweite?", "3": "third?"}
    put_pages(root / "visdoc-tasks" / name, "test", queries, [page(str(number)) for number in range(6)], qrels)


def put_mmeb(root: Path) -> dict[str, tuple[dict[str, list[str]], float]]:
    """A dataset of each of the nine meta-tasks: name -> what each query is to find, best first, and the score of that,
    computed by hand.
    """
    label = {"qry_inst": "<|image_1|>\nName the animal.\n", "tgt_img_path": [""] * 2}
    animals = {"0": ["cat", "dog"], "1": ["dog", "cat"], "2": ["cat", "dog"]}
    put_images(
        root,
        "VOC2007",
        [image_line(**label, qry_img_path=f"VOC2007/{n}.jpg", tgt_text=names) for n, names in animals.items()],
    )
    asked = {"qry_inst": "<|image_1|> Answer the question:", "qry_text": "What is it?", "tgt_img_path": []}
    put_images(root, "OK-VQA", [image_line(**asked, qry_img_path="OK-VQA/a.jpg", tgt_text=["a boat", "a car"])])
    wanted = {"qry_inst": "Find a picture.", "tgt_inst": "<|image_1|> Represent it:", "tgt_text": [""] * 2}
    doors = ["EDIS/red.jpg", "EDIS/blue.jpg"]
    put_images(root, "EDIS", [image_line(**wanted, qry_text="a red door", tgt_img_path=doors)])
    shown = {"qry_inst": "<|image_1|> Find:", "qry_img_path": "coco/a.jpg", "tgt_inst": "<|image_1|> Show it"}
    objects = [(str(n), [f"coco/{n}.jpg", f"coco/{1 - n}.jpg"]) for n in range(2)]
    put_images(
        root,
        "RefCOCO",
        [image_line(**shown, qry_text=text, tgt_text=[""] * 2, tgt_img_path=paths) for text, paths in objects],
    )
    videos = root / "video-tasks"
    put_lines(videos / "SmthSmthV2/test.jsonl", [{"video_id": 7, "pos_text": "Pushing it", "neg_text": ["Pulling it"]}])
    put_frames(videos / "frames/video_cls/SSv2/7")
    choice = {"question": "What?", "video_idx": "x", "option": ["A. one", "B. two"], "answer": "1"}
    put_parquet(videos / "EgoSchema/Subset/test-00000-of-00001.parquet", [choice])
    put_frames(videos / "frames/video_qa/EgoSchema/x")
    put_lines(videos / "DiDeMo/test.jsonl", [{"video": f"clips/{name}.avi", "caption": name} for name in "ab"])
    for name in "ab":
        put_frames(videos / "frames/video_ret/DiDeMo" / name)
    put_lines(videos / "QVHighlight/test.jsonl", [{"query": "a man runs", "video_path": "videos/v1.mp4"}])
    for name in ("query", "positive_0", *(f"negative_{number}" for number in range(9))):
        put_frames(videos / "frames/video_mret/QVHighlight/v1" / name)
    put_vidore(root)
    first, second = (1 + 2 / 2) / (2 + 1 / math.log2(3)), 1.0
    return {
        "VOC2007": ({"0": ["cat"], "1": ["cat", "dog"], "2": ["cat"]}, 2 / 3),
        "OK-VQA": ({"0": ["a car", "a boat"]}, 0.0),
        "EDIS": ({"0": ["EDIS/red.jpg"]}, 1.0),
        "RefCOCO": ({"0": ["coco/0.jpg"], "1": ["coco/0.jpg", "coco/1.jpg"]}, 1 / 2),
        "SmthSmthV2": ({"0:7": ["Pulling it", "Pushing it"]}, 0.0),
        "EgoSchema": ({"0:x": ["two"]}, 1.0),
        "DiDeMo": ({"0": ["a"], "1": ["a", "b"]}, 1 / 2),
        "QVHighlight": ({"0:v1": ["v1/positive_0"]}, 1.0),
        "ViDoRe_biomedical_lectures_v2_multilingual": ({"1": ["4", "0", "3"], "2": ["4"]}, (first + second) / 2),
    }


def planted(dataset: Dataset, found: Mapping[str, Sequence[str]]) -> tuple[Vectors, Vectors]:
    """Vectors with which each query, by name, finds these candidates first, by name, in this order.

    Every candidate has an axis of its own, or shares that of the others of its name. All datasets have one width.
    """
    candidates = list(dataset.candidates)
    axes = {name: axis for axis, name in enumerate(dict.fromkeys(item.name for item in candidates))}
    queries = np.zeros((len(dataset.queries), WIDTH), np.float32)
    queries[:, : len(axes)] = 0.01
    for row, query in enumerate(dataset.queries):
        for place, name in enumerate(found[query.item.name]):
            queries[row, axes[name]] = 1 - 0.1 * place
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows = np.eye(WIDTH, dtype=np.float32)[[axes[item.name] for item in candidates]]
    return (
        Vectors.of((query.item.id for query in dataset.queries), queries),
        Vectors.of((item.id for item in candidates), rows),
    )
