"""Miniature copies of benchmarks, laid out on disk as the published ones, and vectors planted in place of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks.contract import Dataset
from rzen.evaluation.benchmark import Vectors

Lines = Sequence[Mapping[str, Any]]


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


def put_frames(folder: Path, count: int = 3) -> None:
    for number in range(count):
        put(folder / f"frame_{number + 1}.jpg", f"{folder.name} {number}")


def put_images(root: Path, name: str, lines: Lines) -> None:
    """An image set of MMEB-V2 and the pictures that it names."""
    put_parquet(root / f"image-tasks/{name}/test-00000-of-00001.parquet", lines)
    for line in lines:
        for picture in (line["qry_img_path"], *line["tgt_img_path"]):
            if picture:
                put(root / "image-tasks" / picture, picture)


def put_pages(folder: Path, split: str, queries: Mapping[str, str], corpus: Lines, qrels: Lines) -> None:
    """A document set. `corpus` and `qrels` are the rows as published."""
    asked = [{"query-id": id, "query": text} for id, text in queries.items()]
    for name, lines in {"queries": asked, "corpus": corpus, "qrels": qrels}.items():
        put_parquet(folder / name / f"{split}-00000-of-00001.parquet", lines)


def page(name: str, content: str = "") -> dict[str, Any]:
    return {"corpus-id": name, "image": {"bytes": (content or name).encode(), "path": None}}


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
        put(root / f"mbeir_images/{number}.jpg", f"image {number}")
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


def planted(dataset: Dataset, found: Mapping[str, Sequence[str]]) -> tuple[Vectors, Vectors]:
    """Vectors with which each query, by name, finds these candidates first, by name, in this order.

    Every candidate has an axis of its own, or shares that of the others of its name.
    """
    candidates = list(dataset.candidates)
    axes = {name: axis for axis, name in enumerate(dict.fromkeys(item.name for item in candidates))}
    queries = np.full((len(dataset.queries), len(axes)), 0.01, np.float32)
    for row, query in enumerate(dataset.queries):
        for place, name in enumerate(found[query.item.name]):
            queries[row, axes[name]] = 1 - 0.1 * place
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    rows = np.eye(len(axes), dtype=np.float32)[[axes[item.name] for item in candidates]]
    return (
        Vectors.of((query.item.id for query in dataset.queries), queries),
        Vectors.of((item.id for item in candidates), rows),
    )
