"""How much memory the driver of an ingest takes, and how fast tables become shards.

    python -m tests.benchmarks.ingest [--write] [--turns 5] [--rows 1000000] [--listed 26000000]

Each figure comes from a process of its own. Pictures are 224 px JPEGs in the cells of a Parquet file. CPU seconds are
those of all processes, those of Ray included. The plain loop is webdataset's ShardWriter on the rows of the same file:
it decodes nothing, splits and shuffles nothing, and cannot resume.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import MediaConfig
from pipelines.ingest.groups import ListedTable, form_groups, list_table
from pipelines.ingest.settings import IngestSettings
from pipelines.sources.table import open_table
from pipelines.sources.table_config import TableSource
from pipelines.storage.location import open_store
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread

_FILE_ROWS = 1_000_000
_GROUP_ROWS = 10_000
_PICTURES, _PICTURES_OF_GROUP = 4000, 250


def write_texts(folder: Path, num_rows: int) -> None:
    """Parquet files of short questions and answers, and a path of a picture for each."""
    folder.mkdir(parents=True)
    for start in range(0, num_rows, _FILE_ROWS):
        numbers = range(start, min(num_rows, start + _FILE_ROWS))
        columns = {
            "q": [f"question {number}" for number in numbers],
            "p": [f"answer {number}" for number in numbers],
            "image": ["picture.jpg"] * len(numbers),
        }
        pq.write_table(pa.table(columns), folder / f"{start:09d}.parquet", row_group_size=_GROUP_ROWS)
    (folder / "picture.jpg").write_bytes(_picture(0))


def write_pictures(path: Path) -> None:
    """A Parquet file of captions and pictures as bytes."""
    rows = [{"q": f"caption {n}", "image": {"bytes": _picture(n), "path": f"{n}.jpg"}} for n in range(_PICTURES)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=_PICTURES_OF_GROUP)


def _picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 255, (28, 28, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def _table(url: str, **settings: Any) -> ListedTable:
    return list_table(open_table("pairs", TableSource.model_validate({"table": url, **settings})))


def _peak_mb() -> float:
    """Largest resident memory of this process so far, without that of the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def listed(folder: str) -> dict[str, float]:
    """List a table whose media are files, and form its groups: all that the driver knows before a task runs."""
    before_mb, begun_s = _peak_mb(), time.perf_counter()
    table = _table(folder, query={"text": "q"}, positive={"media": "image"}, media_root=folder)
    groups = form_groups(table, {}, IngestSettings(open_store(folder), MediaConfig(), 0.1, 0, 1000))
    rows = sum(group.num_rows for group in groups)
    seconds = time.perf_counter() - begun_s
    return {
        "rows": rows,
        "units": len(table.units),
        "groups": len(groups),
        "before_mb": before_mb,
        "peak_mb": _peak_mb(),
        "s": seconds,
    }


def ingested(table: str, out: str, kind: str) -> dict[str, float]:
    """Ingest a table on a local Ray of two CPUs."""
    import psutil
    import ray

    from pipelines.ingest.ingest import ingest

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=tempfile.mkdtemp("", "rz", "/tmp"))
    before_mb = _peak_mb()
    begun = time.perf_counter(), _cpu_s(psutil.Process())
    positive = {"text": "p"} if kind == "texts" else {"media": "image"}
    report = ingest(
        (),
        open_store(out),
        tables=[_table(table, query={"text": "q"}, positive=positive)],
        media=MediaConfig(),
        held_out_fraction=0.1,
        seed=0,
        samples_per_shard=1000,
    )
    seconds, cpu_s = time.perf_counter() - begun[0], _cpu_s(psutil.Process()) - begun[1]
    peak_mb = _peak_mb()
    ray.shutdown()
    mb = report.num_bytes / 1e6
    return {
        "rows": report.num_accepted,
        "mb": mb,
        "s": seconds,
        "cpu_s": cpu_s,
        "before_mb": before_mb,
        "peak_mb": peak_mb,
    }


def _cpu_s(process: Any) -> float:
    """CPU seconds of a process and of all that it started, as far as they still live or were waited for."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def plain(table: str, out: str) -> dict[str, float]:
    """Write the rows of a Parquet file with webdataset's ShardWriter, in one loop."""
    import webdataset

    Path(out).mkdir(parents=True)
    begun_s, number = (time.perf_counter(), time.process_time()), 0
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=1000, verbose=0) as writer:
        for batch in pq.ParquetFile(table).iter_batches(64):
            for row in batch.to_pylist():
                writer.write({"__key__": f"{number:08d}", "jpg": row["image"]["bytes"], "json": {"q": row["q"]}})
                number += 1
    seconds, cpu_s = time.perf_counter() - begun_s[0], time.process_time() - begun_s[1]
    mb = sum(path.stat().st_size for path in Path(out).glob("*.tar")) / 1e6
    return {"rows": number, "mb": mb, "s": seconds, "cpu_s": cpu_s}


def _measured(arguments: argparse.Namespace, folder: Path) -> str:
    memory = []
    for rows in (10**4, 10**5, 10**6):
        if rows <= arguments.rows:
            say(f"{rows:,} rows")
            write_texts(folder / str(rows), rows)
            memory.append(_asked("ingested", f"{folder}/{rows}/*.parquet", f"{folder}/out{rows}", "texts"))
    say(f"{arguments.listed:,} rows that are listed")
    write_texts(folder / "many", arguments.listed)
    many = _asked("listed", str(folder / "many"))
    say("pictures")
    write_pictures(folder / "pictures.parquet")
    turns: dict[str, list[dict[str, float]]] = {"rzen ingest": [], "ShardWriter": []}
    for turn in range(arguments.turns):
        out = f"{folder}/turn{turn}"
        turns["rzen ingest"].append(_asked("ingested", f"{folder}/pictures.parquet", f"{out}-a", "pictures"))
        turns["ShardWriter"].append(_asked("plain", f"{folder}/pictures.parquet", f"{out}-b"))
    return _report(memory, many, turns)


def _asked(what: str, *words: str) -> dict[str, float]:
    found: dict[str, float] = answer("tests.benchmarks.ingest", what, *words)
    say(f"  {found}")
    return found


def _report(memory: list[dict[str, float]], many: dict[str, float], turns: dict[str, list[dict[str, float]]]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "pyarrow", "webdataset", "pillow"))
    lines = ["# How much memory ingest takes, and how fast it is", "", f"* {describe_machine()}", f"* {versions}", ""]
    lines += ["| rows of text | driver before, MB | driver at most, MB | s | rows/s |", "|---:|---:|---:|---:|---:|"]
    for found in memory:
        rate = found["rows"] / found["s"]
        row = [f"{found[name]:,.0f}" for name in ("rows", "before_mb", "peak_mb", "s")]
        lines.append(f"| {' | '.join(row)} | {rate:,.0f} |")
    lines += [
        "",
        f"A table of {many['rows']:,.0f} rows in {many['units']:,.0f} units was listed and divided into"
        f" {many['groups']:,.0f} groups in {many['s']:.1f} s. The driver took {many['peak_mb']:,.0f} MB at most,"
        f" {many['before_mb']:,.0f} MB of it before.",
        "",
        "| pictures | rows/s | rows/CPU s | MB/CPU s |",
        "|---|---:|---:|---:|",
    ]
    for name, found_turns in turns.items():
        row = [
            spread([turn["rows"] / turn["s"] for turn in found_turns], ",.0f"),
            spread([turn["rows"] / turn["cpu_s"] for turn in found_turns], ",.0f"),
            spread([turn["mb"] / turn["cpu_s"] for turn in found_turns], ",.1f"),
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    pairs = zip(turns["rzen ingest"], turns["ShardWriter"], strict=True)
    ratios = [ours["cpu_s"] / ours["rows"] / (theirs["cpu_s"] / theirs["rows"]) for ours, theirs in pairs]
    lines += ["", f"Medians of {len(ratios)} turns, smallest and largest in brackets. For a row, `rzen ingest` takes"]
    lines[-1] += (
        f" {statistics.median(ratios):.1f} times the CPU of ShardWriter: it decodes each picture once in a child"
    )
    lines[-1] += " process, and hashes, shuffles, splits and indexes."
    return "\n".join(lines) + "\n"


def main() -> None:
    workers: dict[str, Callable[..., dict[str, float]]] = {"listed": listed, "ingested": ingested, "plain": plain}
    if len(sys.argv) > 1 and sys.argv[1] in workers:
        print(json.dumps(workers[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the report next to this script")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10**6, help="most rows of text that are ingested")
    parser.add_argument("--listed", type=int, default=26_000_000, help="rows of the table that is listed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rzen-ingest-") as folder:
        show(_measured(arguments, Path(folder)), __file__, write=arguments.write)


if __name__ == "__main__":
    main()
