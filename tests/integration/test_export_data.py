"""A dataset in the formats of other libraries: nothing is lost on the way there and back, and others can read it."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from jobs.cli import main
from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.formats.export import KIND, export_data
from pipelines.formats.shape import shape_of
from pipelines.media.decode import decode_pixels
from pipelines.samples import Input, Media, MediaKind, Members, Sample, Split
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.storage.location import open_store
from pipelines.storage.publish import claim
from pipelines.storage.store import Store
from tests.data import store_shard
from tests.integration.test_ingest import write_pdf, write_video

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
PER_SHARD = 3
ALIKE = ("clips", "composed", "graded", "pages", "plain")
"""Sources whose samples are all alike. The others are `mixed`, `worded` and `several`."""


def png(red: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (12, 8), (red, 90, 7)).save(sink, "PNG")
    return sink.getvalue()


def make(source: str, number: int, files: dict[str, bytes], **changes: object) -> tuple[Sample, Members]:
    """A sample whose media are those of the files: `q0.png`, `p0.png`, `n00.png`, `n10.png`."""
    kinds: dict[str, MediaKind] = {"png": "image", "mp4": "video", "pdf": "document"}

    def given(slot: str, text: str) -> Input:
        media = (name for name in sorted(files) if name.startswith(slot))
        return Input(text, tuple(Media(kinds[name.rpartition(".")[2]], name) for name in media))

    texts = {"q": f"query {number} | = ä", "p": "", "n0": "", "n1": ""} | {
        slot: str(changes.pop(slot)) for slot in ("q", "p", "n0", "n1") if slot in changes
    }
    negatives = tuple(found for slot in ("n0", "n1") if (found := given(slot, texts[slot])).text or found.media)
    sample = Sample(
        key=f"{number:08d}",
        source=source,
        task=source,
        query=given("q", texts["q"]),
        positive=given("p", texts["p"]),
        negatives=negatives,
        instruction="Find it:",
        target_instruction="What is it?",
        origin=f"raw/{number}",
        **changes,  # type: ignore[arg-type]
    )
    return sample, files


def samples(folder: Path) -> dict[str, list[tuple[Sample, Members]]]:
    write_video(folder / "clip.mp4")
    write_pdf(folder / "page.pdf", 1)
    clip, page = (folder / "clip.mp4").read_bytes(), (folder / "page.pdf").read_bytes()
    return {
        "plain": [make("plain", n, {"p0.png": png(n)}) for n in range(7)],
        "composed": [
            make("composed", n, {"q0.png": png(n), "p0.png": png(n + 9), "n00.png": png(40), "n10.png": png(41)})
            for n in range(4)
        ],
        "graded": [make("graded", n, {}, p=f"answer {n}", relevance=n / 4) for n in range(4)],
        "clips": [make("clips", n, {"p0.mp4": clip}, n0=f"wrong {n}", n1="worse") for n in range(3)],
        "pages": [make("pages", 0, {"p0.pdf": page}), make("pages", 1, {"p0.pdf": page})],
        "mixed": [
            make("mixed", 0, {"q0.png": png(0)}, p="a class"),
            make("mixed", 1, {"q0.png": png(1)}, q="", p="another", n0="['it''s a list]"),
            make("mixed", 2, {"p0.png": png(2), "n10.png": png(3)}, n0="a text", n1="both"),
            make("mixed", 3, {}, p="nothing but text"),
        ],
        "worded": [make("worded", n, {"p0.png": png(n + 60)}, instruction_variants=("See:", "Get:")) for n in range(4)],
        "several": [make("several", n, {"q0.png": png(n), "q1.png": png(n + 50), "p0.png": png(8)}) for n in range(4)],
    }


def store_split(store: Store, found: dict[str, list[tuple[Sample, Members]]], split: Split = "train") -> None:
    store.ensure_bucket()
    infos = {}
    for source, some in found.items():
        parts = [some[start : start + PER_SHARD] for start in range(0, len(some), PER_SHARD)]
        shards = tuple(store_shard(store, split, source, number, part) for number, part in enumerate(parts))
        infos[source] = SourceInfo(some[0][0].task, len(some), shards)
    publish_manifest(store, with_duplicates(store, Manifest(split, infos)))


def shown(kind: MediaKind, data: bytes) -> bytes:
    """The bytes of a file. Of a page the pixels, because ingest takes the page out of the document again."""
    return decode_pixels(kind, data, MediaConfig(page_pixels=4000))[0].tobytes() if kind == "document" else data


def content(root: str, split: Split = "train", endpoint: str | None = None) -> Counter[str]:
    """Everything that training sees of each sample, whatever its key, order and names of files."""
    reader = Reader(DataConfig(root=root, endpoint=endpoint).model_copy(update={"split": split}))

    def plain(given: Input, members: Members) -> list[object]:
        return [given.text, [(media.kind, shown(media.kind, members[media.member]).hex()) for media in given.media]]

    return Counter(
        json.dumps(
            [source, sample.task, sample.instructions, sample.target_instruction, sample.relevance]
            + [plain(given, members) for given in sample.inputs()]
        )
        for source, size in reader.sizes().items()
        for sample, members in reader.raw(source, range(size))
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    store_split(open_store(str(folder / "data")), samples(folder))
    store_split(open_store(str(folder / "data")), {"plain": samples(folder)["plain"][:2]}, "held_out")
    return folder / "data"


def there_and_back(data: Path, folder: Path, name: str, sources: tuple[str, ...], split: str = "train") -> Counter[str]:
    out, again = str(folder / "out"), str(folder / "again")
    chosen = ["--set", f"sources={json.dumps(sources)}"]
    assert main(["export-data", str(data), out, "--format", name, "--split", split, *chosen]) == 0
    assert main(["run", f"{out}/{split}/read_back.yaml", "--set", f"out={again}"]) == 0
    return content(again, split)  # type: ignore[arg-type]


def of(found: Counter[str], sources: tuple[str, ...]) -> Counter[str]:
    return Counter({text: count for text, count in found.items() if json.loads(text)[0] in sources})


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("webdataset", (*ALIKE, "worded")),
        ("mmeb", (*ALIKE, "mixed", "worded")),
        ("sentence_transformers", (*ALIKE, "several")),
    ],
)
def test_samples_are_the_same_after_a_round_trip(
    data: Path, tmp_path: Path, name: str, sources: tuple[str, ...]
) -> None:
    expected = of(content(str(data)), sources)
    assert expected.total() == sum(len(some) for source, some in samples(tmp_path).items() if source in sources)
    assert there_and_back(data, tmp_path, name, sources) == expected


def test_held_out_samples_are_a_dataset_to_evaluate_on(data: Path, tmp_path: Path) -> None:
    assert there_and_back(data, tmp_path, "mmeb", ("plain",), "held_out") == content(str(data), "held_out")


def test_a_split_of_its_own_and_an_object_store(data: Path, tmp_path: Path, s3_endpoint: str) -> None:
    out, again = "s3://exports/data", str(tmp_path / "again")
    endpoint = ["--set", f"endpoint={s3_endpoint}"]
    assert main(["export-data", str(data), out, "--format", "webdataset", "--split", "held_out", *endpoint]) == 0
    spec = tmp_path / "back.yaml"
    spec.write_bytes(open_store(out, s3_endpoint).read("held_out/read_back.yaml"))
    assert main(["run", str(spec), "--set", f"out={again}", *endpoint]) == 0
    assert content(again, "held_out", s3_endpoint) == content(str(data), "held_out")


def test_other_readers_find_pictures_and_texts(data: Path, tmp_path: Path) -> None:
    outs = {name: tmp_path / name for name in ("webdataset", "mmeb", "sentence_transformers")}
    for name, out in outs.items():
        chosen = ["--format", name, "--set", 'sources=["composed", "plain"]']
        assert main(["export-data", str(data), str(out), *chosen]) == 0
    tars = sorted(str(path) for path in (outs["webdataset"] / "train/plain").glob("*.tar"))
    assert len(tars) == 3
    pairs = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("png", "txt")
    read = [(image.getpixel((0, 0))[0], text) for image, text in pairs]
    assert sorted(read) == [(n, f"query {n} | = ä") for n in range(7)]
    with tarfile.open(outs["webdataset"] / "train/composed/000000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.json", "000000000.query.png", "000000000.positive.png"]

    table = pq.read_table(outs["mmeb"] / "train/composed/000000.parquet")
    row = table.to_pylist()[0]
    assert row["qry"] == "<|image_1|>\nquery 0 | = ä"
    assert row["neg_text"] == str(["<|image_1|>\n"] * 2)
    with zipfile.ZipFile(outs["mmeb"] / "images/train/composed/000000.zip") as images:
        assert images.read(row["qry_image_path"]) == png(0)

    table = pq.read_table(outs["sentence_transformers"] / "train/composed")
    assert table.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert table.to_pylist()[0]["anchor"] == {"text": "query 0 | = ä", "image": {"bytes": png(0), "path": "q0.png"}}
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["anchor"]["image"] == {"_type": "Image"}
    assert features["negative_2"] == {"_type": "Image"}


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("webdataset", "several", "source several: has 2 media in the query: use the format sentence_transformers"),
        ("webdataset", "mixed", "source mixed: has text in 3 and media in 2 of 4 query.*use the format mmeb"),
        ("mmeb", "several", "source several: has 2 media in the query"),
        ("sentence_transformers", "mixed", "source mixed: has samples with fewer negatives"),
        ("sentence_transformers", "worded", "source worded: has several instructions"),
        ("mmeb", "gone", "has no source 'gone': its sources: clips, composed"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, source: str, problem: str
) -> None:
    out = tmp_path / "out"
    chosen = ["--format", name, "--set", f"sources=[plain, {source}]"]
    assert main(["export-data", str(data), str(out), *chosen]) == 1
    capsys.readouterr()
    with pytest.raises(UserError, match=problem.replace(": use", "; use").replace("'gone': its", "'gone'; its")):
        export_data(open_store(str(data)), open_store(str(out)), name, "train", sources=["plain", source])  # type: ignore[arg-type]
    assert not (out / "train").exists()


def test_a_new_export_replaces_the_old_one_and_nothing_else(data: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    claim(out, KIND)
    export_data(open_store(str(data)), out, "mmeb", "train", sources=["composed", "graded"])
    (tmp_path / "out/train/composed/notes.txt").write_text("mine")
    export_data(open_store(str(data)), out, "webdataset", "train", sources=["plain"])
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("0*.*")) == [
        f"train/plain/00000{number}.tar" for number in range(3)
    ]
    assert (tmp_path / "out/train/composed/notes.txt").read_text() == "mine"
    assert yaml.safe_load((tmp_path / "out/train/read_back.yaml").read_text())["kind"] == "index"


def test_a_damaged_sample_is_counted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    store_split(store, {"plain": samples(tmp_path)["plain"]})
    (shard,) = (tmp_path / "data/train/plain").glob("plain-000001*.tar")
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.index(b"query 4")] ^= 1
    shard.write_bytes(damaged)
    out = open_store(str(tmp_path / "out"))
    report = export_data(store, out, "webdataset", "train")
    assert (report.accepted, report.rejected) == ({"plain": 6}, {"damaged_shard": 1})
    assert "train/plain/plain-000001.tar at byte" in report.examples["damaged_shard"][0]


def test_the_shape_of_parts_is_that_of_the_whole(tmp_path: Path) -> None:
    for some in samples(tmp_path).values():
        found = [sample for sample, _ in some]
        for cut in range(len(found) + 1):
            assert shape_of(found[:cut]) + shape_of(found[cut:]) == shape_of(found)


def test_a_killed_export_keeps_the_shards_that_are_as_it_left_them(data: Path, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))

    def exported(name: str = "mmeb", *, killed: bool = False) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        claim(out, KIND)
        settings = {"sources": ["plain", "composed"]} | ({"before_publish": stop} if killed else {})
        with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
            export_data(open_store(str(data)), out, name, "train", **settings)  # type: ignore[arg-type]

    def tags() -> dict[str, str]:
        return {path: tag for path, tag in out.tags().items() if path.endswith((".parquet", ".zip", ".tar"))}

    exported(killed=True)
    left = tags()
    assert len(left) == 2 * 5  # three shards and two, with a table and a zip each
    damaged, gone = "train/plain/000000.parquet", "train/composed/000001.json"
    out.write(damaged, b"no table")
    out.delete(gone)
    exported()
    again = {path for path, tag in tags().items() if left[path] != tag}
    assert {path.rpartition("/")[2].partition(".")[0] for path in again} == {"000000", "000001"}
    assert {path.split("/")[-2] for path in again} == {"plain", "composed"}
    assert len(again) == 4
    assert not [path for path in out.list() if path.endswith(".json") and "0000" in path]
    assert pq.read_table(tmp_path / "out" / damaged).num_rows == PER_SHARD

    exported("webdataset", killed=True)
    exported()  # in another format, nothing is kept
    assert {path.rpartition(".")[2] for path in tags()} == {"parquet", "zip"}
