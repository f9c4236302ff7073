"""The three files that a leaderboard entry needs of every dataset, with the names that the benchmark uses.

    {dataset}_info.jsonl    a line for each query: its names for query, relevant candidates and pool, and its grades
    {dataset}_pred.jsonl    the candidates found, best first, with cosines, and the exact ranks of the relevant ones
    {dataset}_score.json    24 metrics, num_pred and num_data

Ids are next to names, which need not be unique.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.results import write_json
from rzen.evaluation.vectors import NONE


def write_files(scored: DatasetScores, folder: Path) -> None:
    """Each written whole or not at all, the score last: where there is one, the others are there.

    `folder` is that of one model and one suite: M-BEIR gives its tasks the same names for both pools.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = scored.dataset.row.name.replace("/", "-")  # the name of a task is free
    _write_lines(folder / f"{name}_info.jsonl", _info(scored))
    _write_lines(folder / f"{name}_pred.jsonl", _predictions(scored))
    write_json(folder / f"{name}_score.json", score_of(scored))


def score_of(scored: DatasetScores) -> dict[str, float | int]:
    """The content of `{dataset}_score.json`."""
    count = len(scored.dataset.queries)
    return {**scored.metrics, "num_pred": count, "num_data": count}


def _info(scored: DatasetScores) -> Iterable[Mapping[str, Any]]:
    wanted = {id for query in scored.dataset.queries for id in query.pool or ()}
    name_of = {item.id: item.name for item in scored.dataset.candidates if item.id in wanted}
    for (_, pairs), query in zip(_pairs(scored), scored.dataset.queries, strict=True):
        pool = {} if query.pool is None else {"cand_names": [name_of[id] for id in query.pool]}
        yield {
            "query_id": query.item.id,
            "query_name": query.item.name,
            "label_name": [scored.names[row] for row in scored.relevant.row[pairs]],
            "rel_scores": scored.relevant.grade[pairs].tolist(),
            **pool,
        }


def _predictions(scored: DatasetScores) -> Iterable[Mapping[str, Any]]:
    for (number, pairs), query in zip(_pairs(scored), scored.dataset.queries, strict=True):
        exists = scored.ranked.rows[number] != NONE
        yield {
            "query_id": query.item.id,
            "prediction": [scored.names[row] for row in scored.ranked.rows[number, exists]],
            "cosines": [round(float(cosine), 6) for cosine in scored.ranked.scores[number, exists]],
            "label": [scored.names[row] for row in scored.relevant.row[pairs]],
            "rel_scores": scored.relevant.grade[pairs].tolist(),
            "label_ranks": scored.ranked.rank[pairs].tolist(),
        }


def _pairs(scored: DatasetScores) -> Iterable[tuple[int, slice]]:
    """Each query's number, and where its relevant candidates stand."""
    bounds = np.searchsorted(scored.relevant.query, np.arange(len(scored.dataset.queries) + 1))
    return ((number, slice(bounds[number], bounds[number + 1])) for number in range(len(bounds) - 1))


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as sink:
        for line in lines:
            sink.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)
