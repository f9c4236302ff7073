"""How much memory the driver of an ingest takes, and how fast tables become shards.

    python -m tests.benchmarks.ingest [--write] [--turns 5] [--rows 1000000] [--listed 26000000] [--peers FOLDER]

Each figure comes from a process of its own. Pictures are 224 px JPEGs in the cells of a Parquet file. CPU seconds are
those of all processes, Ray's included. The writers of others run in one loop over the rows of the same file. They split
and shuffle nothing, and cannot resume. ShardWriter and MDSWriter check no picture. So one loop decodes each with PIL
and then writes it. img2dataset's step decodes with OpenCV.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, version
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
from tests.benchmarks.contenders import import_streaming
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread

_FILE_ROWS = 1_000_000
_GROUP_ROWS = 10_000
_PICTURES, _PICTURES_OF_GROUP = 20_000, 250
_UNCHECKED = ("webdataset ShardWriter", "MosaicML MDSWriter")


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


def _rows(table: str) -> Iterator[tuple[int, str, bytes]]:
    """Number, caption and picture of each row, a few at a time."""
    number = 0
    for batch in pq.ParquetFile(table).iter_batches(64):
        for row in batch.to_pylist():
            yield number, row["q"], row["image"]["bytes"]
            number += 1


def shard_writer(table: str, out: str, _peers: str) -> int:
    """Write with webdataset's ShardWriter."""
    return _write_tars(table, out, lambda data: None)


def decoded_shard_writer(table: str, out: str, _peers: str) -> int:
    """Decode each picture with PIL, and write with webdataset's ShardWriter."""

    def decode(data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.load()

    return _write_tars(table, out, decode)


def _write_tars(table: str, out: str, check: Callable[[bytes], None]) -> int:
    import webdataset

    number = -1
    with webdataset.ShardWriter(f"{out}/%06d.tar", maxcount=1000, verbose=0) as writer:
        for number, caption, data in _rows(table):
            check(data)
            writer.write({"__key__": f"{number:08d}", "jpg": data, "json": {"q": caption}})
    return number + 1


def mds_writer(table: str, out: str, peers: str) -> int:
    """Write with MosaicML's MDSWriter, with a SHA-256 of each shard."""
    streaming, count = import_streaming(peers), 0
    columns = {"q": "str", "jpg": "bytes"}
    with streaming.MDSWriter(out=out, columns=columns, hashes=["sha256"], size_limit=17 << 20) as writer:
        for _, caption, data in _rows(table):
            writer.write({"q": caption, "jpg": data})
            count += 1
    return count


def img2dataset_writer(table: str, out: str, peers: str) -> int:
    """Decode with img2dataset's resizer, which leaves the picture as it is, and write with its writer of tars."""
    sys.path.append(peers)
    from img2dataset.resizer import Resizer  # type: ignore[import-not-found]
    from img2dataset.writer import WebDatasetSampleWriter  # type: ignore[import-not-found]

    resizer = Resizer(256, "no", resize_only_if_bigger=False, skip_reencode=True)
    schema = pa.schema([("key", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
    writer, number = None, -1
    for number, caption, data in _rows(table):
        if number % 1000 == 0:
            if writer:
                writer.close()
            writer = WebDatasetSampleWriter(number // 1000, out, True, 5, schema, "jpg")
        stored, _, _, width, height, error = resizer(io.BytesIO(data))
        assert error is None
        assert writer
        key = f"{number:08d}"
        writer.write(stored, key, caption, {"key": key, "caption": caption, "width": width, "height": height})
    if writer:
        writer.close()
    return number + 1


WRITERS: dict[str, tuple[str, Callable[[str, str, str], int]]] = {
    "shard_writer": ("webdataset ShardWriter", shard_writer),
    "decoded_shard_writer": ("PIL, then ShardWriter", decoded_shard_writer),
    "mds_writer": ("MosaicML MDSWriter", mds_writer),
    "img2dataset_writer": ("img2dataset, resizer and writer", img2dataset_writer),
}
"""Function -> what the report calls it, and the function."""


def written(name: str, table: str, out: str, peers: str) -> dict[str, float]:
    """Measure a writer. Its imports are not counted: a small file was written before."""
    Path(out).mkdir(parents=True)
    write = WRITERS[name][1]
    with tempfile.TemporaryDirectory() as folder:
        few = pq.ParquetFile(table).read_row_group(0).slice(0, 10)
        pq.write_table(few, f"{folder}/few.parquet")
        Path(folder, "few").mkdir()
        write(f"{folder}/few.parquet", f"{folder}/few", peers)
    begun_s = time.perf_counter(), time.process_time()
    rows = write(table, out, peers)
    seconds, cpu_s = time.perf_counter() - begun_s[0], time.process_time() - begun_s[1]
    mb = sum(path.stat().st_size for path in Path(out).iterdir()) / 1e6
    return {"rows": rows, "mb": mb, "s": seconds, "cpu_s": cpu_s}


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
    table = f"{folder}/pictures.parquet"
    names = [name for name in WRITERS if arguments.peers or name.endswith("shard_writer")]
    turns: dict[str, list[dict[str, float]]] = {"rzen ingest": [], **{WRITERS[name][0]: [] for name in names}}
    for turn in range(arguments.turns):
        out = f"{folder}/turn{turn}"
        turns["rzen ingest"].append(_asked("ingested", table, out, "pictures"))
        for name in names:
            turns[WRITERS[name][0]].append(_asked("written", name, table, f"{out}-{name}", arguments.peers or ""))
    return _report(memory, many, turns, arguments.peers)


def _asked(what: str, *words: str) -> dict[str, float]:
    found: dict[str, float] = answer("tests.benchmarks.ingest", what, *words)
    say(f"  {found}")
    return found


def _report(
    memory: list[dict[str, float]],
    many: dict[str, float],
    turns: dict[str, list[dict[str, float]]],
    peers: str | None,
) -> str:
    named = [f"{name} {version(name)}" for name in ("ray", "pyarrow", "webdataset", "pillow")]
    for name in ("mosaicml-streaming", "img2dataset", "opencv-python-headless") if peers else ():
        named += [f"{name} {found.version}" for found in distributions(name=name, path=[peers])]
    versions = ", ".join(named)
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
        f"{_PICTURES:,} pictures of 224 px, medians of {len(turns['rzen ingest'])} turns, smallest and largest in"
        " brackets. Last column: CPU of `rzen ingest` for a row, as a multiple.",
        "",
        "| pictures | checks each | rows/s | rows/CPU s | MB/CPU s | rzen takes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, found_turns in turns.items():
        ratios = [
            ours["cpu_s"] / ours["rows"] / (theirs["cpu_s"] / theirs["rows"])
            for ours, theirs in zip(turns["rzen ingest"], found_turns, strict=True)
        ]
        row = [
            "no" if name in _UNCHECKED else "yes",
            spread([turn["rows"] / turn["s"] for turn in found_turns], ",.0f"),
            spread([turn["rows"] / turn["cpu_s"] for turn in found_turns], ",.0f"),
            spread([turn["mb"] / turn["cpu_s"] for turn in found_turns], ",.1f"),
            "" if name == "rzen ingest" else spread(ratios, ".1f"),
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += ["", "`rzen ingest` also hashes, shuffles, splits and indexes. Its start is counted, theirs is not."]
    return "\n".join(lines) + "\n"


def main() -> None:
    workers: dict[str, Callable[..., dict[str, float]]] = {"listed": listed, "ingested": ingested, "written": written}
    if len(sys.argv) > 1 and sys.argv[1] in workers:
        print(json.dumps(workers[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the report next to this script")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=10**6, help="most rows of text that are ingested")
    parser.add_argument("--listed", type=int, default=26_000_000, help="rows of the table that is listed")
    parser.add_argument(
        "--peers",
        metavar="FOLDER",
        help="packages of MDSWriter and img2dataset: pip install --no-deps --target FOLDER mosaicml-streaming"
        " img2dataset albumentations albucore==0.0.24 simsimd stringzilla opencv-python-headless exifread fire"
        " termcolor dataclasses_json marshmallow typing_inspect brotli zstd python-snappy cramjam catalogue xxhash",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rzen-ingest-") as folder:
        show(_measured(arguments, Path(folder)), __file__, write=arguments.write)


if __name__ == "__main__":
    main()
