"""Which datasets of the table are there, what to fetch for the others, and opening one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.benchmarks import mbeir, mmeb
from pipelines.benchmarks.files import find_parts
from pipelines.benchmarks.pages import read_pages
from pipelines.benchmarks.table import HUB, SUITES
from pipelines.benchmarks.types import Dataset, Row
from pipelines.errors import UserError

_READERS: dict[str, Callable[[Row, Path], Dataset]] = {
    "image": mmeb.read_images,
    "video_class": mmeb.read_video_class,
    "video_choice": mmeb.read_video_choice,
    "video_retrieval": mmeb.read_video_retrieval,
    "video_qa": mmeb.read_video_qa,
    "moment": mmeb.read_moments,
    "moment_seeker": mmeb.read_moment_seeker,
    "pages": read_pages,
    "pages_short": read_pages,
    "mbeir": mbeir.read_mbeir,
}


@dataclass(frozen=True, slots=True)
class DatasetStatus:
    """A row, and in one line what is missing and how to get it; empty where its lists and media folders are there."""

    row: Row
    missing: str = ""


def open_dataset(row: Row, root: Path) -> Dataset:
    """Reads a dataset of the table below `root`. Raises `UserError` where something is missing or does not fit."""
    return _READERS[row.layout](row, root.absolute())


def check_datasets(roots: Mapping[str, Path]) -> list[DatasetStatus]:
    """Every row of the suites of `roots` (suite -> its folder), in the order of the table. Reads no file.

    Opening a dataset reports a single picture that is missing.
    """
    return [
        DatasetStatus(row, _missing(row, roots[suite].absolute()))
        for suite, rows in SUITES.items()
        if suite in roots
        for row in rows.values()
    ]


def format_status(found: list[DatasetStatus]) -> str:
    """A line for each dataset: name, meta-task, queries, pool, metric, and what is missing. Then how many are there."""
    width = max((len(one.row.name) for one in found), default=0)
    lines = []
    suite = ""
    for one in found:
        row = one.row
        if row.suite != suite:
            suite = row.suite
            mine = [other for other in found if other.row.suite == suite]
            lines.append(f"{suite}: {sum(not other.missing for other in mine)} of {len(mine)} datasets are there")
        facts = f"{row.name:<{width}}  {row.meta_task}, {row.num_queries} queries, {row.pool} pool, {row.metric}"
        lines.append(f"  {facts}{f', {row.revision}' if row.revision else ''}")
        if one.missing:
            lines.append(f"    missing: {one.missing}")
    return "\n".join(lines) + "\n"


def _missing(row: Row, root: Path) -> str:
    try:
        if row.layout == "mbeir":
            return _missing_files(row, root)
        fetch = f"fetch {row.source} into {root / row.data}"
        if row.layout.startswith("pages"):  # pictures are made from the corpus
            for part in ("queries", "corpus", "qrels"):
                find_parts(root / row.data, row.split, part, fetch)
            return ""
        if row.name != "MVBench":
            find_parts(root / row.data, row.split, row.subset, fetch)
        elif not (root / row.data).is_dir():
            raise UserError(str(root / row.data), "does not exist", fetch)
    except UserError as error:
        return str(error)
    if not (root / row.media).is_dir():
        archives = f"{HUB}TIGER-Lab/MMEB-V2"
        return f"{root / row.media}: does not exist; fetch {archives} and unpack its archives there"
    return ""


def _missing_files(row: Row, root: Path) -> str:
    for path in (*mbeir.paths(row, root).values(), root / "mbeir_images"):
        if not path.exists():
            return f"{path}: does not exist; fetch {row.source} into {root}"
    return ""
